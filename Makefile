# make demo     fit, train, evaluate and attack on scikit-learn's digits: both tables in a few minutes
# make tables DATASET=D [EPOCHS=100] [OUT_DATASET=..] [OUT_DIR=..] [DATA_DIR=..] [GPU=0 or GPUS="0 1"] [LABELS="Base CCU"]
#               train whatever is missing, write both tables; -j 4 runs independent jobs side by side;
#               LABELS="CCU CCU-seed1 CCU-seed2" trains with other seeds too; ARGS="--download 1" is for every script,
#               GMM_ARGS="--PCA 0" for gen_gmm.py, TRAIN_ARGS="--amp 1" for run_training.py, EVAL_ARGS="--ood NAME=FOLDER"
#               for gen_eval.py
# make results  write results/README.md and the README's tables from results/
# make figures [DATASET=D] [FIGURE_ARGS="--image_size 64"]
#               draw what can be drawn of the models and tables that are there: results/figures/
# make test     the tests           make check   lint, tests and a short demo, as CI runs them
PYTHON ?= python3
PY := "$(abspath .venv)/bin/python"
INSTALLED := .venv/.installed

.PHONY: demo tables mixtures results figures test lint check FORCE

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

# --- the demo; CI shortens it -------------------------------------------------------------------------------------

demo: EPOCHS ?= 20
# ACET attacks every batch: half the epochs, 5 steps instead of 40
demo: ACET_EPOCHS = $(shell expr \( $(EPOCHS) + 1 \) / 2)
demo: STEPS ?= 60
demo: RESTARTS ?= 2
demo: LABELS = Base CEDA ACET CCU
# where it writes: `make check` must not replace the models of who runs it
demo: DIR = .
demo: RUN = cd "$(DIR)" && $(PY) "$(CURDIR)"/
demo: TRAIN = $(RUN)run_training.py --dataset Digits --augm_flag 1

demo: $(INSTALLED)
	$(RUN)gen_gmm.py --dataset Digits --PCA 1 --augm_flag 1
	$(TRAIN) --train_type plain --epochs $(EPOCHS)
	$(TRAIN) --train_type CEDA --epochs $(EPOCHS)
	$(TRAIN) --train_type ACET --fit_out 1 --steps 5 --epochs $(ACET_EPOCHS)
	$(TRAIN) --train_type CEDA_GMM --use_gmm 1 --PCA 1 --fit_out 1 --epochs $(EPOCHS)
	$(RUN)gen_eval.py --dataset Digits --drop_mmc 0 --models $(LABELS)
	$(RUN)gen_attack_stats.py --datasets Digits --wide_format 1 --fit_out 1 --models $(LABELS) --batches 1 --steps $(STEPS) --restarts $(RESTARTS)
	@echo
	@echo 'Next, the same on MNIST (--download 1 fetches it and 1 GB of out-images; README, "Data", has other ways):'
	@echo '  .venv/bin/python gen_gmm.py --dataset MNIST --PCA 1 --augm_flag 1 --out_dataset RandomImages300k --download 1'
	@echo '  .venv/bin/python run_training.py --dataset MNIST --train_type plain --augm_flag 1'
	@echo '  .venv/bin/python run_training.py --dataset MNIST --train_type CEDA_GMM --augm_flag 1 --use_gmm 1 --PCA 1 --fit_out 1'
	@echo '  .venv/bin/python gen_eval.py --dataset MNIST --drop_mmc 1 --download 1'
	@echo '  .venv/bin/python gen_attack_stats.py --datasets MNIST --wide_format 1 --fit_out 1'

# --- both tables of a data set, from whatever is trained already ---------------------------------------------------
# exec: what ends make ends the script, not a shell around it

DATASET ?= Digits
# empty: the epochs of params.py; Digits is there to be run on a laptop
digits = $(filter Digits,$(DATASET))
EPOCHS ?= $(if $(digits),30)
STEPS ?= $(if $(digits),100,500)
RESTARTS ?= $(if $(digits),5,50)
# a Python too old to read model_paths is named where it installs
KNOWN := $(shell $(PYTHON) -c 'import model_paths; print(*model_paths.LABELS)' 2> /dev/null)
LABELS ?= $(KNOWN)
MODELS := checkpoints/$(DATASET)
$(if $(filter-out 1,$(words $(DATASET))),$(error DATASET: give one))
$(if $(LABELS),,$(if $(KNOWN),$(error LABELS: give at least one of $(KNOWN))))
# what was trained elsewhere and imported has its checkpoint already
UNKNOWN := $(shell $(PYTHON) -c 'import sys, model_paths as m; print(*(label for label in sys.argv[1:] if m.without_seed(label) not in m.LABELS))' $(LABELS:%='%') 2> /dev/null)
$(foreach label,$(UNKNOWN),$(if $(wildcard $(MODELS)/$(label).pt),,\
  $(error LABELS: unknown label $(label); known: $(KNOWN), with other seeds Base-seed1 and so on)))
$(if $(findstring --seed,$(ARGS) $(TRAIN_ARGS)),$(if $(findstring -seed,$(LABELS)),\
  $(error ARGS, TRAIN_ARGS: --seed would hold for the labels that end in -seed1 and so on, too; leave it out)))
FOLDER := $(if $(DATA_DIR),--data_dir "$(DATA_DIR)")
DATA := $(FOLDER) $(ARGS)
# the first script fetches for all, not several at once the same files
fetching := $(findstring --download,$(ARGS))
NO_OUT := Base% ACET2% MCD% EDL% DE% GAN%
OUT := $(addprefix --out_dataset ,$(OUT_DATASET)) $(if $(OUT_DIR),--out_dir "$(OUT_DIR)")
# as in the demo, ACET's attacks are shortened where everything has to run on a laptop
$(MODELS)/ACE%.pt: ACET = $(if $(digits),--steps 10)
# labels take the GPUs in turn
GPUS ?= $(GPU)
position = $(shell printf '%s\n' $(LABELS) | grep -nx '$(1)' | cut -d: -f1)
gpu = $(if $(GPUS),--gpu $(word $(shell echo $$(( $(or $(call position,$(1)),0) % $(words $(GPUS)) + 1 ))),$(GPUS)))

# .table1 and .table2 hold what the tables that make made are of; others, as those of the repository, are newer than these
tables: $(MODELS)/.table2 $(MODELS)/.table1
stale = $(shell test -f $(1).csv && test ! $(1).csv -nt $(2) && test "$$(cat $(2) 2> /dev/null)" = "$(3)" || echo FORCE)
TABLE1 := results/table1_$(DATASET)
TABLE2 := results/table2_$(DATASET)
# not where a model was replaced meanwhile
stamp = @test -n "$$(find $(filter %.pt,$^) -newer $@.begun)" || echo '$(1)' > $@; rm $@.begun
unquoted = $(subst ",,$(subst ',,$(1)))
OF1 := $(strip $(strip $(LABELS)), $(STEPS) steps, $(RESTARTS) restarts $(call unquoted,$(FOLDER) $(subst --download 1,,$(ARGS))))
OF2 := $(strip $(LABELS) $(call unquoted,$(DATA) $(EVAL_ARGS)))

$(MODELS)/.table2: $(LABELS:%=$(MODELS)/%.pt) $(call stale,$(TABLE2),$(MODELS)/.table2,$(OF2)) | $(INSTALLED)
	@touch $@.begun
	exec $(PY) gen_eval.py --dataset $(DATASET) --drop_mmc 0 $(DATA) $(call gpu,Base) --models $(LABELS) $(EVAL_ARGS) --output $(TABLE2)
	$(call stamp,$(OF2))

$(MODELS)/.table1: $(sort $(LABELS:%=$(MODELS)/%.pt) $(MODELS)/CCU.pt) $(call stale,$(TABLE1),$(MODELS)/.table1,$(OF1)) | $(INSTALLED) $(if $(fetching),$(MODELS)/.table2)
	@touch $@.begun
	exec $(PY) gen_attack_stats.py --datasets $(DATASET) --wide_format 1 --fit_out 1 $(DATA) $(call gpu,CCU) --models $(LABELS) --steps $(STEPS) --restarts $(RESTARTS) --resume 1 --output $(TABLE1)
	$(call stamp,$(OF1))

# with -j they share the cores: trainings that each take all of them wait for each other
jobs = $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS)))
cores := $$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
share = $(if $(jobs),$(if $(OMP_NUM_THREADS),,env OMP_NUM_THREADS=$$((($(cores) + $(jobs) - 1) / $(jobs)))))

# written whole or not at all, and replaced only at the end: not for make to delete when it is interrupted
.PRECIOUS: $(MODELS)/%.pt
$(MODELS)/%.pt: | $(INSTALLED)
	exec $(share) $(PY) run_training.py --dataset $(DATASET) $$($(PY) -c 'import model_paths; print(model_paths.options("$*"))') --augm_flag 1 $(if $(filter ODIN% Maha%,$*),,$(addprefix --epochs ,$(EPOCHS))) $(DATA) $(if $(filter $(NO_OUT),$*),,$(OUT)) $(call gpu,$*) --resume 1 $(ACET) $(TRAIN_ARGS)

# those that are there need no mixtures any more, and may be the authors'
WAITING := $(sort CCU CCUs $(if $(fetching),$(LABELS),$(filter CCU%,$(LABELS))))
$(filter-out $(wildcard $(MODELS)/*.pt),$(WAITING:%=$(MODELS)/%.pt)): | mixtures
$(foreach label,$(sort ODIN Maha $(filter ODIN% Maha%,$(LABELS))),\
  $(eval $(MODELS)/$(label).pt: $(MODELS)/$(subst ODIN,Base,$(label:Maha%=Base%)).pt))

# gen_gmm.py knows itself what is there
mixtures: | $(INSTALLED)
	exec $(PY) gen_gmm.py --dataset $(DATASET) --PCA 1 --augm_flag 1 $(DATA) $(OUT) $(call gpu,CCU) --resume 1 $(GMM_ARGS)

# with -j too, what draws on the tables waits for those that are made
results figures: $(INSTALLED) $(filter tables,$(MAKECMDGOALS))

results:
	$(PY) gen_results.py

figures:
	$(PY) gen_figures.py --datasets $(DATASET) $(FOLDER) $(FIGURE_ARGS)

# --- checks ------------------------------------------------------------------------------------------------------

test: $(INSTALLED)
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check .

check: lint test
	dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(MAKE) demo DIR=$$dir EPOCHS=2 STEPS=5 RESTARTS=1
