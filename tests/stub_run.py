"""Stands in for papermill in the tests of the sweep: makes a run's directory in no time, without torch.

Called as papermill is: ``NOTEBOOK OUTPUT -f PARAMETERS ...``. What it does for a seed is the text of the file ``SEED`` in
$STUB, else it succeeds: ``error`` raises in a cell, ``die`` kills itself, ``die once`` the first time only,
``wait`` lasts until the file ``go`` is there.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml
from filelock import FileLock

from pa_core.params import Experiment

stub = Path(os.environ["STUB"])
parameters = yaml.safe_load(Path(sys.argv[4]).read_text())
parameters.pop("figures_dir", None)
experiment = Experiment.from_mapping(parameters)
digest = experiment.digest(data=os.environ["STUB_DATA"], image_size=28)
path = Path(os.environ["PA_RUNS"], f"fashion-mini_test-resnet_{experiment.schedule.replace(',', '-')}_{digest[:12]}")
path.mkdir(parents=True, exist_ok=True)


def note(name: str, text: str) -> None:
    with open(stub / name, "a") as file:
        file.write(f"{experiment.seed} {text}\n")


def cell(**output: object) -> dict:
    return {
        "cell_type": "code",
        "execution_count": 4,
        "metadata": {},
        "source": ["run = pa.run(experiment)"],
        "outputs": [output],
    }


note("started", f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
note("trim", str(os.environ.get("MALLOC_TRIM_THRESHOLD_")))
behaviour = stub / str(experiment.seed)
what = behaviour.read_text() if behaviour.exists() else ""
with FileLock(path / "lock"):
    manifest = path / "manifest.json"
    if not manifest.exists():
        if what == "error":
            failed = cell(
                output_type="error",
                ename="NonFiniteLoss",
                evalue="the loss is not finite in epoch 3, step 7",
                traceback=[],
            )
            Path(sys.argv[2]).write_text(json.dumps({"cells": [failed]}))
            sys.exit(1)
        if what.startswith("die"):
            if what == "die once":
                behaviour.write_text("")
            print("about to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        while what == "wait" and not (stub / "go").exists():
            time.sleep(0.02)
        note("trained", "")
        content = {
            "digest": digest,
            "parameters": experiment.to_dict(),
            "status": "finished",
            "started": "2025-01-01T00:00:00+00:00",
        }
        content |= dict.fromkeys(["code_version", "split_digest", "data_digest", "device_name", "precision"], "x")
        content |= {"image_size": 28, "batch_size": 64}
        accuracy = int(hashlib.sha256(digest.encode()).hexdigest()[:4], 16) / 16**4
        (path / "summary.json").write_text(
            json.dumps({"test_accuracy": accuracy, "val_accuracy": accuracy, "epochs": 1})
        )
        (path / ".part").write_text(json.dumps(content))
        os.replace(path / ".part", manifest)
Path(sys.argv[2]).write_text(json.dumps({"cells": [cell(output_type="stream", name="stdout", text=["done"])]}))
