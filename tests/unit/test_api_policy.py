# SPDX-License-Identifier: Apache-2.0
"""Who may use the API."""

import pytest
from api_parts import NEW, ONE, TWO, make_centre
from oslo_config import cfg
from oslo_policy import generator

from fastboot_glance.api import policy

CALLS = [
    ('GET', '/v1/images'), ('GET', f'/v1/images/{ONE}'),
    ('POST', f'/v1/images/{ONE}/action'), ('GET', '/v1/hosts'),
    ('GET', '/v1/hosts/h1'), ('POST', '/v1/hosts/h1/sync'),
]
OWNERS = """
fastboot:images:list: role:member
fastboot:images:show: rule:admin_api or project_id:%(project_id)s
fastboot:images:build: rule:admin_api or project_id:%(project_id)s
"""


@pytest.mark.parametrize('method, path', CALLS)
@pytest.mark.parametrize('roles', ['member', 'reader,member', ''])
def test_only_admins_by_default(tmp_path, monkeypatch, method, path, roles):
    centre = make_centre(tmp_path, monkeypatch)
    centre.report('h1', {})
    body = {'build': {}} if 'action' in path else None
    status, answer = centre(path, method, body, X_Roles=roles,
                            X_Auth_Token='u:p1')
    assert status == 403
    assert 'fastboot:' in answer['error']['message']
    assert not centre.board.posted
    assert not centre.agents.told
    assert centre(path, method, body, X_Roles='admin')[0] in (200, 202)


def test_owners_see_theirs_where_the_operator_says_so(tmp_path, monkeypatch):
    centre = make_centre(tmp_path, monkeypatch, OWNERS)
    centre.report('h1', {ONE: 'ready'})
    member = {'X_Auth_Token': 'u:p1', 'X_Roles': 'member'}
    status, body = centre('/v1/images', **member)
    assert [row['id'] for row in body['images']] == [ONE]
    # Hosts are the operator's matter still.
    assert body['images'][0]['hosts'] == {}
    assert centre('/v1/images?host=h1', **member)[0] == 403
    assert centre(f'/v1/images/{ONE}', **member)[0] == 200
    assert centre(f'/v1/images/{TWO}', **member)[0] == 403
    # Nor may they find out which ids there are.
    assert centre(f'/v1/images/{NEW}', **member)[0] == 403
    for image_id, action, expected in (
            (ONE, 'build', 202), (TWO, 'build', 403), (ONE, 'refresh', 403)):
        assert centre(f'/v1/images/{image_id}/action', 'POST', {action: {}},
                      **member)[0] == expected
    assert centre('/v1/hosts', **member)[0] == 403


def test_without_a_token(tmp_path, monkeypatch):
    """Keystone's middleware refuses before anything of ours runs."""
    centre = make_centre(tmp_path, monkeypatch)
    from fastboot_glance.api import app
    centre.conf.set_override('auth_strategy', 'keystone', group='api')
    with (tmp_path / 'fastboot.conf').open('a') as file:
        file.write('[keystone_authtoken]\n'
                   'www_authenticate_uri = http://keystone.invalid\n')
    centre.conf.reload_config_files()
    centre.app = app.deploy(centre.conf)
    for method, path in CALLS:
        response = centre.raw(path, method, X_Roles='admin',
                              X_Identity_Status='Confirmed')
        assert response.status_int == 401
    assert centre('/')[0] == 200
    assert centre.raw('/healthcheck').status_int == 200


def test_every_rule_is_documented():
    for rule in policy.list_rules()[1:]:
        assert rule.operations
        assert rule.description
    assert len({rule.name for rule in policy.list_rules()}) == 8


def test_sample_policy_can_be_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, 'get_policies_dict',
                        lambda namespaces: {'fastboot': policy.list_rules()})
    path = tmp_path / 'sample.yaml'
    generator._generate_sample(['fastboot'], str(path))
    assert '#"fastboot:hosts:sync": "rule:admin_api"' in path.read_text()


def test_enforcer_for_the_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(policy.cfg, 'CONF', cfg.ConfigOpts())
    assert 'fastboot:images:list' in \
        policy.get_enforcer().registered_rules
