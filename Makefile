# SPDX-License-Identifier: Apache-2.0
# "make demo" and "make test" need nothing but a fresh Debian 12.
.PHONY: help prepare sandbox sandbox-down demo demo-standalone test test-all \
	test-cloud tempest faults resumes newer fuzz lint docs bench clean

STATE ?= $(CURDIR)/.state
SANDBOX = tools/sandbox --state-dir $(STATE)/sandbox
CLOUD_PYTHON = $(STATE)/sandbox/venv/bin/python
# They run Glance itself, which only the sandbox has.
GLANCE_TESTS = $(addprefix tests/functional/test_, builder.py \
	glance_images.py import_plugin.py api_services.py)
# They need libvirt's Python module, which it has, too.
LIBVIRT_TESTS = $(addprefix tests/functional/test_, agent_resume.py \
	agent_reboots.py microvm.py) \
	$(addprefix tests/unit/test_, reboots.py resume.py)
# They run Nova's code, and need no cloud.
NOVA_TESTS = $(addprefix tests/openstack/test_, backend.py driver.py \
	spawn.py)
CLOUD_TESTS = FASTBOOT_SANDBOX=$(STATE)/sandbox $(CLOUD_PYTHON) -m pytest -q

help:
	@echo 'make demo             the main job, in a real OpenStack'
	@echo 'make demo-standalone  the main job, without OpenStack'
	@echo 'make sandbox          a real OpenStack with fastboot, here'
	@echo 'make sandbox-down     stop it'
	@echo 'make test             lint, unit and functional tests, one'
	@echo '                      end-to-end path in the cloud'
	@echo 'make test-all         these and the slow ones'
	@echo 'make tempest          Tempest, with Nova'\''s driver and with ours'
	@echo 'make faults           break everything around guests that prove'
	@echo '                      their disks [FAULTS=500] [SEED=1]'
	@echo 'make resumes          resume servers while what it takes breaks'
	@echo '                      [RESUMES=200] [SEED=1]'
	@echo 'make newer            bake and resume with the QEMU and libvirt of a'
	@echo '                      newer Debian [SUITE=trixie]'
	@echo 'make fuzz             give all parsers of outside bytes any bytes'
	@echo '                      [FUZZ_SECONDS=600] [TARGETS="pack manifest"]'
	@echo 'make bench            benchmarks; results in bench/results'
	@echo '                      [SUITE=microvm] [RUNS=7]'
	@echo 'make docs             documentation in doc/build/html'
	@echo 'make clean            remove what all that left in .state'

prepare:
	@tools/prepare

sandbox:
	@tools/prepare sandbox
	@$(SANDBOX) up

sandbox-down:
	@$(SANDBOX) down

demo:
	@tools/prepare test sandbox
	@$(SANDBOX) up --link-rate 1gbit
	$(CLOUD_PYTHON) tools/demo --state-dir $(STATE)/sandbox \
		--guests $(STATE)/demo

demo-standalone:
	@tools/prepare test microvm
	.venv/bin/python tools/demo-standalone --state-dir $(STATE)/demo

lint:
	@tools/prepare
	.venv/bin/tox -q -e pep8

test: test-cloud
	.venv/bin/tox -q -e pep8,docs,py3,functional

# What needs Nova's and Glance's code, and one path through the cloud.
test-cloud:
	@tools/prepare test sandbox
	@$(SANDBOX) up
	$(CLOUD_TESTS) -m 'not slow' $(NOVA_TESTS) $(GLANCE_TESTS) \
		$(LIBVIRT_TESTS)
	$(CLOUD_TESTS) -m smoke tests/openstack
	@$(SANDBOX) down

test-all: test
	.venv/bin/tox -q -e slow
	@$(SANDBOX) up
	$(CLOUD_TESTS) -m slow $(GLANCE_TESTS) $(LIBVIRT_TESTS)
	$(CLOUD_TESTS) tests/openstack
	@$(SANDBOX) down

tempest:
	@tools/prepare test sandbox
	@$(SANDBOX) up
	$(CLOUD_PYTHON) tools/tempest --state-dir $(STATE)
	@$(SANDBOX) down

FAULTS ?= 500
SEED ?= 1

faults:
	@tools/prepare test sandbox
	@$(SANDBOX) up
	$(CLOUD_PYTHON) tests/faults/harness.py --state-dir $(STATE)/sandbox \
		--faults $(FAULTS) --seed $(SEED)
	@$(SANDBOX) down

RESUMES ?= 200

resumes:
	@tools/prepare test sandbox
	@$(SANDBOX) up
	$(CLOUD_PYTHON) tests/faults/resumes.py --state-dir $(STATE)/sandbox \
		--resumes $(RESUMES) --seed $(SEED)
	@$(SANDBOX) down

newer:
	@tools/prepare test
	tools/debian $(STATE) $(or $(SUITE),trixie) sh -c 'tools/prepare microvm \
		&& .venv/bin/python -m pytest -q tests/functional/test_microvm.py'

FUZZ_SECONDS ?= 600

fuzz:
	@tools/prepare
	/usr/bin/python3 tests/fuzz/run.py --state-dir $(STATE) \
		--seconds $(FUZZ_SECONDS) $(TARGETS)

BENCH_RUNS = $(if $(RUNS),--runs $(RUNS))

ifneq (,$(filter openstack operations,$(SUITE)))
bench:
	@tools/prepare test bench sandbox
	@$(SANDBOX) up --link-rate 1gbit
	FASTBOOT_SANDBOX=$(STATE)/sandbox $(CLOUD_PYTHON) -m bench \
		--state-dir $(STATE)/bench --suite $(SUITE) $(BENCH_RUNS)
else
bench:
	@tools/prepare test bench $(if $(filter microvm formats,$(SUITE)),microvm)
	LIBVIRT_DEBUG=4 tools/reaped .venv/bin/python -m bench \
		--state-dir $(STATE)/bench \
		$(if $(SUITE),--suite $(SUITE)) $(BENCH_RUNS)
endif

docs:
	@tools/prepare
	.venv/bin/tox -q -e docs

clean:
	@[ ! -d $(STATE)/sandbox ] || $(SANDBOX) down
	rm -rf $(STATE)
