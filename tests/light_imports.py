"""Code for programs that only speak, which lets them import synthetic speech in a second, without torch."""

from pathlib import Path

import dinosr_hf

# Stands for the packages around it, and for the one module of the model that audio takes a constant from.
LIGHT_IMPORTS = f"""
import sys, types
for name in ("", ".data", ".model"):
    package = sys.modules["dinosr_hf" + name] = types.ModuleType("dinosr_hf" + name)
    package.__path__ = [{str(Path(dinosr_hf.__file__).parent)!r} + name.replace(".", "/")]
configuration = sys.modules["dinosr_hf.model.configuration_dinosr"] = types.ModuleType("configuration")
configuration.SAMPLING_RATE = 16_000
from dinosr_hf.data.synthetic import SyntheticCorpus
"""
