# The two commands of the README: `make demo` and `make test`. Everything lives in .venv and runs/.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
# make demo STEPS=40 is the short form; SFT takes as many steps, DPO three quarters.
STEPS ?= 400
# Processes that share a suite's files. Nearly all of its time is compilation, which keeps one core busy. Slow tests that start
# processes of their own stay alone, and so does parity, which has torch's threads.
WORKERS ?= 2

.PHONY: venv demo test test-all parity lint benchmark clean

venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (about a minute) ..."
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-eval: .venv/installed requirements-eval.txt
	$(PIP) -r requirements-eval.txt
	@touch $@

.venv/installed-dev: .venv/installed-eval requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

# A second environment, so that the everyday one stays without torch.
.venv-parity/installed: requirements.txt requirements-dev.txt requirements-parity.txt
	$(PYTHON) -m venv .venv-parity
	@echo "installing torch and transformers into .venv-parity ..."
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r requirements-dev.txt -r requirements-parity.txt
	@touch $@

demo: .venv/installed-eval
	rm -rf runs/demo
	.venv/bin/python train.py --config=configs/tiny.py:steps=$(STEPS) --workdir=runs/demo/pretrain
	.venv/bin/python train.py --config=configs/tiny.py:stage=sft,steps=$(STEPS) --workdir=runs/demo/sft \
	  --config.train.init_from=runs/demo/pretrain
	.venv/bin/python train.py --config=configs/tiny.py:stage=dpo,steps=$(shell expr $(STEPS) \* 3 / 4) --workdir=runs/demo/dpo \
	  --config.train.init_from=runs/demo/sft
	.venv/bin/python eval.py --compare runs/demo/pretrain runs/demo/sft runs/demo/dpo --out=runs/demo/comparison \
	  --evals=perplexity,routing,context,passkey,lm_eval --limit=24 --passkey_trials=4 --routing_tokens=20000
	@echo "Look at runs/demo/comparison/report.html and the report.png of runs/demo/pretrain, sft and dpo."

test: .venv/installed-dev
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

test-all: .venv/installed-dev
	.venv/bin/python -m pytest -m "slow and not gpu and not parity and not processes" -n $(WORKERS) --dist loadfile
	.venv/bin/python -m pytest -m "slow and not gpu and not parity and processes"

parity: .venv-parity/installed
	.venv-parity/bin/python -m pytest -m parity

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# About 45 minutes on two cores that do nothing else: beside transformers 20, where a step's time goes 2, growth 5, the rest 15.
benchmark: .venv/installed .venv-parity/installed
	.venv-parity/bin/python -m benchmarks.cpu
	.venv/bin/python -m benchmarks.phases
	.venv/bin/python -m benchmarks.growth
	.venv/bin/python -m benchmarks.experts
	.venv/bin/python -m benchmarks.compile_time
	.venv/bin/python -m benchmarks.data
	.venv/bin/python -m benchmarks.conversion_memory
	.venv/bin/python -m benchmarks.decode

clean:
	rm -rf .venv .venv-parity runs reports
