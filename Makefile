# make demo   fit, train, evaluate and attack on scikit-learn's digits: both tables in a few minutes
# make test   the tests           make check   lint, tests and a short demo, as CI runs them
PYTHON ?= python3
PY := $(abspath .venv/bin/python)
INSTALLED := .venv/.installed
# of the demo; CI shortens it
EPOCHS ?= 30
STEPS ?= 60
RESTARTS ?= 3
LABELS := Base CEDA ACET CCU

.PHONY: demo test lint check next

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

TRAIN = $(PY) run_training.py --dataset Digits --augm_flag 1 --epochs $(EPOCHS)

demo: $(INSTALLED)
	$(PY) gen_gmm.py --dataset Digits --PCA 1 --augm_flag 1
	$(TRAIN) --train_type plain
	$(TRAIN) --train_type CEDA
	$(TRAIN) --train_type ACET --fit_out 1 --steps 10
	$(TRAIN) --train_type CEDA_GMM --use_gmm 1 --PCA 1 --fit_out 1
	$(PY) gen_eval.py --dataset Digits --drop_mmc 0 --models $(LABELS)
	$(PY) gen_attack_stats.py --datasets Digits --wide_format 1 --fit_out 1 --models $(LABELS) --steps $(STEPS) --restarts $(RESTARTS)
	@echo
	@echo 'Next, the same on MNIST (fetched by --download 1; README, "Data", has other ways):'
	@echo '  .venv/bin/python gen_gmm.py --dataset MNIST --PCA 1 --augm_flag 1 --download 1'
	@echo '  .venv/bin/python run_training.py --dataset MNIST --train_type plain --augm_flag 1 --amp 1'
	@echo '  .venv/bin/python run_training.py --dataset MNIST --train_type CEDA_GMM --augm_flag 1 --use_gmm 1 --PCA 1 --fit_out 1 --amp 1'
	@echo '  .venv/bin/python gen_eval.py --dataset MNIST --drop_mmc 1'
	@echo '  .venv/bin/python gen_attack_stats.py --datasets MNIST --wide_format 1 --fit_out 1'

test: $(INSTALLED)
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check .

check: lint test
	$(MAKE) demo EPOCHS=2 STEPS=5 RESTARTS=1
