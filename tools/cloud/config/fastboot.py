# SPDX-License-Identifier: Apache-2.0
"""fastboot's own files, and its repository's web server."""

from cloud.config.ini import Sections, authtoken, client, merged, render
from cloud.layout import FASTBOOT_DIR, REPOSITORY_PORT, Layout, Node

#: Builders, API and import plugin all are on control.
JOBBOARD = 'redis://127.0.0.1:6379/0'
_REPORT_SECONDS = 10


def _common(layout: Layout) -> Sections:
    return {'DEFAULT': {'state_dir': FASTBOOT_DIR,
                        'transport_url': layout.bus}}


def central(layout: Layout) -> str:
    """fastboot.conf, of builder and API."""
    return render(merged(_common(layout), {
        'repository': {'location': FASTBOOT_DIR / 'repository'},
        'database': {'connection': layout.database('fastboot')},
        'jobboard': {'connection': JOBBOARD},
        'glance': client(layout, 'fastboot'),
        # Minutes are for clouds that live for years.
        'builder': {'audit_interval': 60, 'retry_wait': 5},
        'api': {'stale_after': 3 * _REPORT_SECONDS},
        'oslo_messaging_notifications': {'driver': 'messagingv2'},
        'oslo_policy': {
            'policy_file': layout.etc / 'fastboot' / 'policy.yaml'},
        **authtoken(layout, 'fastboot'),
    }))


def agent(layout: Layout, node: Node) -> str:
    """agent.conf of a host; without database and jobboard."""
    return render(merged(_common(layout), {
        'repository': {'location': f'http://127.0.0.1:{REPOSITORY_PORT}'},
        'export': {'group': 'kvm'},
        'agent': {'host': node.name, 'interval': 30, 'jitter': 0,
                  'report_interval': _REPORT_SECONDS},
        'oslo_messaging_notifications': {'driver': 'messagingv2'},
    }))


def policy() -> str:
    """policy.yaml: the defaults hold."""
    return '{}\n'


def nginx(layout: Layout) -> str:
    """nginx.conf: the repository, read-only."""
    return f'''\
daemon off;
user root;
worker_processes 1;
pid /run/nginx.pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
  access_log off;
  sendfile on;
  client_body_temp_path /run/nginx-body;
  proxy_temp_path /run/nginx-proxy;
  fastcgi_temp_path /run/nginx-fastcgi;
  uwsgi_temp_path /run/nginx-uwsgi;
  scgi_temp_path /run/nginx-scgi;
  server {{
    listen {layout.control.address}:{REPOSITORY_PORT};
    root {FASTBOOT_DIR}/repository;
  }}
}}
'''
