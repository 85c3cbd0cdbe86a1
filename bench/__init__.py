# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ours, stock and raw side by side in one run.

``make bench`` runs every suite, prints a table and writes
``bench/results/<suite>.json``.
"""
