# SPDX-License-Identifier: Apache-2.0
"""TaskFlow flows of the builders."""
