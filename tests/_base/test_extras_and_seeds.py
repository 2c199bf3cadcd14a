import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from lineament._base.errors import InputError
from lineament._base.extras import available, folder, require
from lineament._base.seeds import generator, seeded


def test_a_missing_package_says_which_command_installs_it():
    with pytest.raises(InputError, match=r"pip install 'lineament\[web\]'"):
        require("surely_not_installed", extra="web")
    assert not available("surely_not_installed.sub")


def test_a_carrier_is_found_without_running_its_code(tmp_path, monkeypatch):
    carrier = tmp_path / "carrier_of_files"
    carrier.mkdir()
    (carrier / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert folder("carrier_of_files", package="carrier-of-files") == carrier
    with pytest.raises(InputError, match="pip install --no-deps carrier-two"):
        folder("carrier_two", package="carrier-two")


def test_seeded_gives_the_former_states_back():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with seeded(7):
        first = (torch.rand(1).item(), random.random(), np.random.rand())
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    with seeded(7):
        assert first == (torch.rand(1).item(), random.random(), np.random.rand())
    assert torch.equal(torch.rand(3, generator=generator(3)), torch.rand(3, generator=generator(3)))


def test_the_package_imports_without_torch():
    code = "import sys, lineament; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
