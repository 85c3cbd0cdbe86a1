# SPDX-License-Identifier: Apache-2.0
"""The application: middleware, routes, and errors in JSON."""

import json
import re
from collections.abc import Callable
from typing import Any, Final

import oslo_middleware
import webob
import webob.dec
from keystoneauth1 import exceptions as ksa_exceptions
from oslo_context import context as oslo_context
from oslo_log import log as logging
from oslo_middleware import request_id
from oslo_policy import policy as oslo_policy

from fastboot_common import exception
from fastboot_glance.api import auth, hosts, images, parts, policy
from fastboot_glance.api.call import Call, Conflict, NotAllowed

LOG = logging.getLogger(__name__)

_Handler = Callable[..., tuple[int, dict[str, Any]]]

_ROUTES: Final[tuple[tuple[str, str, _Handler], ...]] = (
    ('GET', '/v1/images', images.index),
    ('GET', '/v1/images/([^/]+)', images.show),
    ('POST', '/v1/images/([^/]+)/action', images.act),
    ('GET', '/v1/hosts', hosts.index),
    ('GET', '/v1/hosts/([^/]+)', hosts.show),
    ('POST', '/v1/hosts/([^/]+)/sync', hosts.sync),
)
_ERRORS: Final[tuple[tuple[type[Exception], int], ...]] = (
    (exception.NotFound, 404),
    (exception.Invalid, 400),
    (oslo_policy.PolicyNotAuthorized, 403),
    (oslo_policy.InvalidScope, 403),
    (Conflict, 409),
    (exception.Busy, 409),
    (exception.Unavailable, 503),
    # The middleware could not ask Keystone about the token.
    (ksa_exceptions.ClientException, 503),
)
_RETRY_SECONDS: Final = '5'


def _answer(status: int, body: dict[str, Any]) -> webob.Response:
    return webob.Response(
        status=status, content_type='application/json', charset='UTF-8',
        body=json.dumps(body).encode())


def _error(request: Any, status: int, message: str,
           headers: dict[str, str] | None = None) -> webob.Response:
    response = _answer(status, {'error': {
        'code': status, 'title': webob.Response(status=status).status[4:],
        'message': message,
        'request_id': request.environ.get(request_id.ENV_REQUEST_ID, ''),
    }})
    response.headers.update(headers or {})
    if status == 503:
        response.headers['Retry-After'] = _RETRY_SECONDS
    return response


@webob.dec.wsgify.middleware
def _errors(request: Any, application: Any) -> Any:
    """Every error is an answer in JSON, and only ours are explained."""
    try:
        return request.get_response(application)
    except NotAllowed as error:
        return _error(request, 405, str(error), {'Allow': error.allowed})
    except Exception as error:
        status = next((status for kind, status in _ERRORS
                       if isinstance(error, kind)), 500)
        if status == 500:
            LOG.exception('%s %s failed', request.method, request.path)
        known = status != 500 or isinstance(error, exception.FastbootError)
        return _error(request, status, str(error) if known else
                      'unexpected; the log of the API has more')


@webob.dec.wsgify
def _versions(request: Any) -> webob.Response:
    """The version document, for whoever looks what there is."""
    return _answer(200, {'versions': [{
        'id': 'v1.0', 'status': 'CURRENT', 'min_version': '', 'version': '',
        'links': [{'rel': 'self', 'href': f'{request.application_url}/v1/'}],
    }]})


class _Resources:
    """Everything behind authentication."""

    def __init__(self, conf: Any) -> None:
        self._parts = parts.Parts(conf)
        self._enforcer = policy.make_enforcer(conf)

    @webob.dec.wsgify
    def __call__(self, request: Any) -> webob.Response:
        context = oslo_context.RequestContext.from_environ(
            request.environ, request_id=request.environ.get(
                request_id.ENV_REQUEST_ID))
        handler, arguments = _route(request)
        call = Call(request, context, self._enforcer, self._parts)
        return _answer(*handler(call, *arguments))


def _route(request: Any) -> tuple[_Handler, tuple[str, ...]]:
    """:raises NotFound: there is no such path.
    :raises NotAllowed: it knows other methods only.
    """
    try:
        path = request.path_info
    except UnicodeDecodeError:
        raise exception.Invalid('the path is not UTF-8') from None
    allowed = []
    for method, pattern, handler in _ROUTES:
        match = re.fullmatch(pattern, path.rstrip('/'))
        if match and method == request.method:
            return handler, match.groups()
        if match:
            allowed.append(method)
    if allowed:
        raise NotAllowed(allowed)
    raise exception.NotFound('there is no such path')


def _public_first(conf: Any) -> Any:
    """What needs no token, and else everything behind authentication."""
    protected = auth.protect(_Resources(conf), conf)
    healthcheck = oslo_middleware.Healthcheck(
        None, {'oslo_config_config': conf})

    def application(environ: dict[str, Any], start: Any) -> Any:
        path = environ.get('PATH_INFO', '')
        if path == '/healthcheck':
            return healthcheck(environ, start)
        if path in ('', '/', '/v1', '/v1/'):
            return _versions(environ, start)
        return protected(environ, start)

    return application


def deploy(conf: Any) -> Any:
    """The WSGI application of a configuration."""
    application = _errors(_public_first(conf))
    application = oslo_middleware.HTTPProxyToWSGI(
        application, {'oslo_config_config': conf})
    return oslo_middleware.RequestId(application)
