# make demo    creates .venv and synthetic data, then trains, tests and predicts: ten minutes on two cores
# make demos   trains all four tasks on synthetic data and prints their metrics: half an hour
# make tables  measures the synthetic tables of results/TABLES.md again: hours
# make bench   repeats the benchmarks in results/benchmarks; make bench-gpu repeats those that need a GPU
# make test    runs the test suite
# make lint    checks style, types and the storeys (which module may import which)

PYTHON ?= python3
BIN := .venv/bin
DEMO := --config tasks/seg_voc.yaml --config configs/demo.yaml --data.root data/demo --run_dir runs/demo

.PHONY: demo demos tables bench bench-gpu test lint format clean

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sis-lightning needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/sis-lightning synth data/demo --images 2000 --size 96 --min-object 16 --rotation 30 --kinds voc
	$(BIN)/sis-lightning fit $(DEMO) --overwrite true
	$(BIN)/sis-lightning test $(DEMO)
	$(BIN)/sis-lightning predict $(DEMO)
	@echo "Images: runs/demo/images (predictions beside the ground truth during training),"
	@echo "        runs/demo/predictions (masks and overlays of the val split), data/demo/contact_sheet.png"

# All four tasks on synthetic data, about eight minutes of training each on two cores.
demos: .venv/installed
	$(BIN)/sis-lightning synth data/demos --images 2000 --size 96 --min-object 16 --rotation 30
	for task in cls_cifar100 seg_voc det_voc kpt_coco; do \
		options="--config tasks/$$task.yaml --config configs/demo.yaml --data.root data/demos --run_dir runs/demos/$$task"; \
		$(BIN)/sis-lightning fit $$options --overwrite true && $(BIN)/sis-lightning test $$options || exit 1; \
	done
	$(BIN)/sis-lightning bench --runs $(addprefix runs/demos/,cls_cifar100 seg_voc det_voc kpt_coco) --name demos

# The synthetic tables of results/TABLES.md: some hours on two cores; interrupted runs are resumed.
tables: .venv/installed
	$(BIN)/sis-lightning tables run --table S1 S2 S3 S4 --jobs 2
	$(BIN)/sis-lightning tables figures
	$(BIN)/sis-lightning tables render

# Half an hour on a quiet machine.
bench: .venv/installed
	$(BIN)/sis-lightning bench --start
	$(BIN)/sis-lightning bench --costs
	$(BIN)/sis-lightning bench --eval
	$(BIN)/sis-lightning bench --loop --rounds 6
	$(BIN)/sis-lightning bench --operators --batch 16 --rounds 15 --seconds 0.2
	$(BIN)/sis-lightning bench sis50+deploy timm:res2net50_26w_4s+deploy torchvision:resnet50+deploy sis50 \
		--mode inference --rounds 21 --seconds 1.5 --name cpu-inference
	$(BIN)/sis-lightning bench sis50 timm:res2net50_26w_4s torchvision:resnet50 timm:res2next50 \
		--mode train --rounds 21 --seconds 3 --name cpu-train
	$(BIN)/sis-lightning bench sis50+deploy+compile sis50+compile timm:res2net50_26w_4s+compile \
		torchvision:resnet50+compile sis50 --mode inference --batch 32 --precision bf16 --rounds 6 --name cpu-traffic
	$(BIN)/sis-lightning bench --data

bench-gpu: .venv/installed
	$(BIN)/sis-lightning bench --operators --batch 256 --device cuda
	$(BIN)/sis-lightning bench sis50+compile timm:res2net50_26w_4s timm:res2net50_26w_4s+compile sis50 \
		torchvision:resnet50 --mode train --batch 256 --precision bf16 --device cuda --name gpu-train
	$(BIN)/sis-lightning bench sis50+deploy+compile torchvision:resnet50 torchvision:resnet50+deploy+compile \
		timm:res2net50_26w_4s+deploy+compile sis50+deploy --mode inference --batch 256 --precision bf16 --device cuda \
		--name gpu-inference
	$(BIN)/sis-lightning bench sis50+deploy+graphs torchvision:resnet50+deploy+graphs sis50+deploy --mode inference \
		--batch 1 --precision bf16 --device cuda --name gpu-latency

# Two workers with one thread each: more threads than cores only wait for one another. The tests of SLURM come first and
# wait most of the time; the other worker takes over what the one that runs them has not begun.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
