"""Stands in for papermill in the tests of the sweep: makes a run's directory in no time, without torch.

It lies as ``papermill.py`` on the path of the processes that a sweep starts, and is called as papermill is:
``NOTEBOOK OUTPUT -f PARAMETERS ...``. Where the run of a seed lies is in ``$STUB/places.json``. What it does for a seed
is the text of the file ``SEED`` there, else it succeeds: ``error`` raises in a cell, ``die`` kills itself, ``die once``
the first time only, ``kill`` its worker, ``nothing`` makes no run, ``wait`` lasts until the file ``go`` is there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml
from filelock import FileLock

stub = Path(os.environ["STUB"])
parameters = yaml.safe_load(Path(sys.argv[4]).read_text())
seed = parameters["seed"]
manifest = Path(json.loads((stub / "places.json").read_text())[str(seed)], "manifest.json")
manifest.parent.mkdir(parents=True, exist_ok=True)


def note(name: str, text: str) -> None:
    with open(stub / name, "a") as file:
        file.write(f"{seed} {text}\n")


def write(**output: object) -> None:
    """The executed notebook, which ends with this output."""
    cell = {"cell_type": "code", "execution_count": 4, "metadata": {}, "source": ["run = pa.run(experiment)"]}
    Path(sys.argv[2]).write_text(json.dumps({"cells": [cell | {"outputs": [output]}]}))


note("started", f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
note("trim", str(os.environ.get("MALLOC_TRIM_THRESHOLD_")))
note("parameters", json.dumps(parameters))
behaviour = stub / str(seed)
what = behaviour.read_text() if behaviour.exists() else ""
with FileLock(manifest.with_name("lock")):
    if not manifest.exists() and what != "nothing":
        if what == "error":
            write(output_type="error", ename="NonFiniteLoss", evalue="the loss is not finite in step 7", traceback=[])
            sys.exit(1)
        if what.startswith("die"):
            if what == "die once":
                behaviour.write_text("")
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "kill":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)  # it ends with its worker
        while what == "wait" and not (stub / "go").exists():
            time.sleep(0.02)
        note("trained", "")
        content = json.loads((stub / "manifest.json").read_text())
        content["parameters"]["seed"] = seed
        measured = {"test_accuracy": seed / 1000, "val_accuracy": 0.5, "epochs": 1}
        manifest.with_name("summary.json").write_text(json.dumps(measured))
        manifest.with_name("part").write_text(json.dumps(content | {"digest": f"{seed:064x}"}))
        os.replace(manifest.with_name("part"), manifest)
write(output_type="stream", name="stdout", text=["done"])
