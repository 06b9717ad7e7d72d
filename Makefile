# The developers' commands. Each makes its own virtual environment first.
#   make demo    an app guarded, one client allowed, one refused, explained
#   make check   format, lint, types, architecture and the pure tests
#   make test    everything, with real programs
#   make docs    write the reference from the code
#   make bench   measure
#   make bench-guard  measure the guard beside nginx, HAProxy, Envoy, stunnel and hitch (half an hour)
#   make bench-audit  attack handfast, nginx, HAProxy, stunnel and Envoy with the same checks (10 minutes)

PYTHON ?= python3
BIN := .venv/bin
# What the tests run beside us: command -> Debian package.
PROGRAMS := openssl:openssl curl:curl nginx:nginx-light chromium:chromium certutil:libnss3-tools \
	tshark:tshark systemd-socket-activate:systemd systemd-analyze:systemd psql:postgresql-client pg_ctlcluster:postgresql

.PHONY: demo check test docs bench bench-guard bench-audit programs clean

.venv/made: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (make PYTHON=python3.12 …)"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: .venv/made
	@$(BIN)/handfast demo

check: .venv/made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 tests/pki tests/policy tests/wire tests/test_architecture.py tests/test_errors.py

test: .venv/made programs
	$(BIN)/pytest -q -n 4 --dist worksteal $(ARGS)

docs: .venv/made
	$(BIN)/python docs/generate.py

bench: .venv/made
	$(BIN)/python benchmarks/run.py

bench-guard: .venv/made
	$(BIN)/python benchmarks/guard/run.py $(ARGS)

# Root on a machine with apt gets what is missing; anyone else is told.
programs:
	@missing=""; for pair in $(PROGRAMS); do PATH="$$PATH:/usr/sbin" command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	  else echo "these packages are missing:$$missing (apt-get install$$missing)"; exit 1; fi; \
	fi

bench-audit: .venv/made
	$(BIN)/python benchmarks/audit/run.py --page docs/explanation/audit-of-peers.md $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
