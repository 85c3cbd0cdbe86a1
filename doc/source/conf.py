# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

project = 'fastboot'
author = 'fastboot developers'
copyright = author  # noqa: A001
extensions = [
    'cliff.sphinxext', 'oslo_config.sphinxext', 'openstackdocstheme',
    'reno.sphinxext',
]
exclude_patterns = []
html_theme = 'openstackdocs'
openstackdocs_auto_name = False
openstackdocs_use_storyboard = False
