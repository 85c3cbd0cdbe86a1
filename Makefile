# SPDX-License-Identifier: Apache-2.0
# "make demo" and "make test" need nothing but a fresh Debian 12.
.PHONY: help prepare demo demo-standalone test test-all lint docs bench clean

STATE ?= $(CURDIR)/.state

help:
	@echo 'make demo      build guests, register them, boot them both ways'
	@echo 'make test      lint, unit and functional tests, one end-to-end'
	@echo 'make test-all  these and the slow ones'
	@echo 'make bench     all benchmarks; results in bench/results'
	@echo 'make docs      documentation in doc/build/html'
	@echo 'make clean     remove what demo and tests left in .state'

prepare:
	@tools/prepare

demo demo-standalone:
	@tools/prepare test
	.venv/bin/python tools/demo --state-dir $(STATE)/demo

lint:
	@tools/prepare
	.venv/bin/tox -q -e pep8

test:
	@tools/prepare test
	.venv/bin/tox -q -e pep8,docs,py3,functional

test-all: test
	.venv/bin/tox -q -e slow

bench:
	@tools/prepare test bench
	.venv/bin/python -m bench --state-dir $(STATE)/bench \
		$(if $(SUITE),--suite $(SUITE))

docs:
	@tools/prepare
	.venv/bin/tox -q -e docs

clean:
	rm -rf $(STATE)
