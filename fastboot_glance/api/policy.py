# SPDX-License-Identifier: Apache-2.0
"""Who may do what: the rules, and asking them."""

from typing import Any, Final

from oslo_config import cfg
from oslo_policy import opts as policy_opts
from oslo_policy import policy

ADMIN: Final = 'rule:admin_api'
_SCOPES: Final = ['system', 'project']


def _rule(name: str, description: str, method: str,
          path: str) -> policy.DocumentedRuleDefault:
    return policy.DocumentedRuleDefault(
        name=f'fastboot:{name}', check_str=ADMIN, description=description,
        operations=[{'path': path, 'method': method}], scope_types=_SCOPES)


RULES: Final = (
    policy.RuleDefault(
        'admin_api', 'role:admin',
        description='Who is an administrator of fastboot. Caches concern '
                    'hosts, so that all rules ask for one by default.'),
    _rule('images:list', 'List images. What a caller may not show is left '
                         'out of the list.', 'GET', '/v1/images'),
    _rule('images:show', 'Show an image. The target\'s "project_id" is the '
                         'owner of the image, so that "rule:admin_api or '
                         'project_id:%(project_id)s" lets owners see theirs.',
          'GET', '/v1/images/{image_id}'),
    _rule('images:build', 'Build the cache of an image. The target is as '
                          'for "images:show".',
          'POST', '/v1/images/{image_id}/action (build)'),
    _rule('images:refresh', 'Build the cache of an image anew. The target '
                            'is as for "images:show".',
          'POST', '/v1/images/{image_id}/action (refresh)'),
    _rule('hosts:list', 'List compute hosts. Also asked before an image '
                        'shows which hosts have it.', 'GET', '/v1/hosts'),
    _rule('hosts:show', 'Show what a compute host has. Images that the '
                        'caller may not show are left out.',
          'GET', '/v1/hosts/{host}'),
    _rule('hosts:sync', 'Tell a compute host to fetch what it lacks.',
          'POST', '/v1/hosts/{host}/sync'),
)


def list_rules() -> list[policy.RuleDefault]:
    """All rules, for ``oslopolicy-sample-generator``."""
    return list(RULES)


def make_enforcer(conf: Any) -> policy.Enforcer:
    """What asks the rules, with the operator's policy file in effect."""
    policy_opts.set_defaults(conf, policy_file='policy.yaml')
    enforcer = policy.Enforcer(conf)
    enforcer.register_defaults(list_rules())
    return enforcer


def get_enforcer() -> policy.Enforcer:
    """The enforcer of the machine's configuration, for oslo.policy's
    tools."""
    conf = cfg.CONF
    conf([], project='fastboot')
    return make_enforcer(conf)
