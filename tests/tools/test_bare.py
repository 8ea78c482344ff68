"""Without timm the model without a config is built and prepared: machines that are borrowed."""

import os
import subprocess
import sys

WITHOUT_TIMM = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "timm" else found(name, *rest)
import benchmark

model = benchmark.prepare_for_inference(benchmark.bare_model(5))
print(type(model).__name__)
"""


def test_without_timm():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", WITHOUT_TIMM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["PreparedDetector"], run.stderr
