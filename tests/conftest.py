# SPDX-License-Identifier: Apache-2.0
"""For all tests: a gate must not depend on chance, a developer's run may."""

import os

from hypothesis import settings

settings.register_profile('ci', derandomize=True, deadline=None)
settings.register_profile('default', deadline=None)
settings.load_profile('ci' if os.environ.get('CI') else 'default')
