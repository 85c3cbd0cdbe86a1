# SPDX-License-Identifier: Apache-2.0
"""XML from outside, read without doing what it asks.

libvirt's documents have elements, attributes and text. Whatever else XML
can do, declarations and entities first, is refused before a parser sees it.
"""

from typing import Final
from xml.etree import ElementTree

from fastboot_common import exception

#: Bytes of a document. A domain with everything plugged has 30,000.
LIMIT: Final = 1 << 20
_DEPTH: Final = 64
_ELEMENTS: Final = 20_000

Element = ElementTree.Element


class _Builder(ElementTree.TreeBuilder):
    """Builds trees that code may walk without bounds of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._count = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        self._depth += 1
        self._count += 1
        if self._depth > _DEPTH or self._count > _ELEMENTS:
            raise exception.Corrupt('XML: nested too deep, or too much of it')
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        self._depth -= 1
        return super().end(tag)


def parse(text: str, root: str = 'domain') -> Element:
    """Read a document.

    :param root: the name that its root must have.
    :raises Corrupt: it is no such document, or asks for more than elements.
    """
    if len(text) > LIMIT:
        raise exception.Corrupt(f'XML: {len(text)} characters are too many')
    # Declarations, entities, CDATA, comments, instructions: none is
    # libvirt's way to say something.
    if '<!' in text or '<?' in text:
        raise exception.Corrupt('XML: only elements are read')
    parser = ElementTree.XMLParser(target=_Builder())  # noqa: S314
    try:
        parser.feed(text)
        tree: Element = parser.close()
    except (ElementTree.ParseError, ValueError) as error:
        raise exception.Corrupt(f'XML: {error}') from error
    if tree.tag != root:
        raise exception.Corrupt(f'XML: {tree.tag!r} is no {root}')
    return tree


def text_of(tree: Element) -> str:
    """The document as text.

    :raises Corrupt: it has what XML cannot say.
    """
    try:
        return ElementTree.tostring(tree, encoding='unicode')
    except (TypeError, ValueError) as error:
        raise exception.Corrupt(f'XML: {error}') from error


def canonical(tree: Element) -> str:
    """The document in the one form that equal documents have."""
    return ElementTree.canonicalize(
        ElementTree.tostring(tree, encoding='unicode'), strip_text=True)
