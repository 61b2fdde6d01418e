# @title Setup: installs the book's package where it is missing, else does nothing
import importlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile

VERSION = "@VERSION@"
REVISION = "main"
REPOSITORY = "@REPOSITORY@"
MODULES = "@MODULES@"


def ready():
    """Whether everything imports, the package at the right version."""
    try:
        modules = {name: importlib.import_module(name) for name in MODULES.split()}
    except ImportError:
        return False
    return modules["guided_descent"].__version__ == VERSION


def install():
    """Install the package with what the chapters need; a torch that is already here stays."""
    source = os.environ.get("GUIDED_DESCENT_SOURCE", f"git+{REPOSITORY}@{REVISION}")
    if os.path.exists(source):
        source = pathlib.Path(source).resolve().as_uri()
    wanted = source if " @ " in source else f"guided-descent[book] @ {source}"
    torch = [f"torch=={d.version}" for d in importlib.metadata.distributions(name="torch")]
    with tempfile.TemporaryDirectory() as folder:
        keep = pathlib.Path(folder, "constraints.txt")
        keep.write_text("\n".join(torch[:1]))
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", str(keep), wanted], check=True)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.split(".")[0] == "guided_descent"]:
        del sys.modules[name]


if not ready():
    install()
