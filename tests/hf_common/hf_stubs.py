"""
Stand-ins for the parts of Hugging Face's `tests` tree that its sdist leaves out.

The transformers sdist ships the common mixins (tests/test_*.py) but none of the tests/<folder>/ that they import.
`install()` puts small modules of our own under the missing names, so that the mixins import and run:

    tests.exporters.test_export            ExportTesterMixin: torch.export through transformers' own DynamoExporter
    tests.generation.test_utils            GenerationTesterMixin: only ever used in an issubclass() check
    tests.utils.test_configuration_utils   config_common_kwargs: non-default values for what every config accepts
    tests.pipelines.test_pipelines_*       the checks of a task that PipelineTesterMixin drives
"""

import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import transformers.utils
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter


class ExportTesterMixin:
    """Every class exports with torch.export, and the exported program computes what the eager model computes."""

    test_torch_exportable = True

    def _check_export(self, dynamic: bool) -> None:
        if not self.test_torch_exportable:
            self.skipTest("declared as not exportable")
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                transformers.set_seed(0)
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                if dynamic:  # which takes its time for every layer; the frames stay the same
                    if config.feature_encoder == "conv":
                        field, stride = config.receptive_field, config.inputs_to_logits_ratio
                        config.conv_dim, config.conv_kernel, config.conv_stride = (
                            config.conv_dim[:1],
                            [field],
                            [stride],
                        )
                    config.num_hidden_layers = config.num_codebooks = config.num_conv_pos_embeddings = 1
                inputs = self._prepare_for_class(inputs, model_class)
                model = model_class(config).eval()
                with torch.no_grad():
                    eager = model(**inputs)[0]
                    exported = DynamoExporter().export(model, dict(inputs), config=DynamoConfig(dynamic=dynamic))
                    # 5.17 returns the program itself, later releases one with what goes with it
                    program = exported if isinstance(exported, torch.export.ExportedProgram) else exported.program
                    got = program.module()(**inputs)
                got = got[0] if isinstance(got, tuple | list) else next(iter(got.values()))
                torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)

    def test_torch_export_static(self):
        self._check_export(dynamic=False)

    def test_torch_export_dynamic(self):
        self._check_export(dynamic=True)


class GenerationTesterMixin:
    """Nothing of ours generates; the mixins ask only whether a test case is one of these."""


# Values that differ from PreTrainedConfig's defaults; ConfigTester checks that each survives __init__.
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 7,
    "architectures": ["SomeArchitecture"],
    "id2label": {0: "yes"},
    "label2id": {"yes": 0},
    "problem_type": "regression",
}


def noise(seconds: float, seed: int, sampling_rate: int = 16_000) -> np.ndarray:
    """White noise, float32 (S,)."""
    samples = np.random.default_rng(seed).standard_normal(int(seconds * sampling_rate))
    return (0.1 * samples).astype(np.float32)


class AutomaticSpeechRecognitionPipelineTests:
    """Text from arrays, dicts, batches and chunks; timestamps of characters and words."""

    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        if tokenizer is None or feature_extractor is None:
            return None, None
        recognise = transformers.AutomaticSpeechRecognitionPipeline(
            model=model, tokenizer=tokenizer, feature_extractor=feature_extractor, dtype=dtype, device="cpu"
        )
        return recognise, [noise(1.0, seed=0), noise(2.0, seed=1)]

    def run_pipeline_test(self, recognise, examples):
        for audio in (examples[0], {"raw": examples[0], "sampling_rate": 16_000}):
            result = recognise(audio)
            assert set(result) == {"text"}, result
            assert isinstance(result["text"], str), result
        results = recognise(list(examples), batch_size=2)
        assert [set(result) for result in results] == [{"text"}] * len(examples)
        assert isinstance(recognise(examples[1], chunk_length_s=1.0, stride_length_s=0.2)["text"], str)
        for unit in ("char", "word"):
            result = recognise(examples[1], return_timestamps=unit)
            assert set(result) == {"text", "chunks"}, result
            for chunk in result["chunks"]:
                start, end = chunk["timestamp"]
                assert 0 <= start <= end <= 2.0 + 0.1, chunk
        with pytest.raises(ValueError, match="CTC can either predict"):
            recognise(examples[0], return_timestamps="sentence")


class AudioClassificationPipelineTests:
    """A probability for each label, and the best `top_k` of them."""

    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        classify = transformers.AudioClassificationPipeline(
            model=model, feature_extractor=feature_extractor, dtype=dtype, device="cpu"
        )
        return classify, [noise(1.0, seed=2), noise(1.5, seed=3)]

    def run_pipeline_test(self, classify, examples):
        labels = set(classify.model.config.id2label.values())
        for audio in (examples[0], {"raw": examples[1], "sampling_rate": 16_000}):
            result = classify(audio, top_k=None)
            assert {answer["label"] for answer in result} == labels, result
            assert abs(sum(answer["score"] for answer in result) - 1) < 1e-2, result
        assert len(classify(examples[0], top_k=1)) == 1


def add_module(name: str, **attributes: Any) -> None:
    """Make `import name` give a module of these attributes, with the packages that it stands in."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent not in sys.modules and parent != "tests":
        add_module(parent, __path__=[])
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)


def other_pipeline_tests() -> Iterator[tuple[str, str]]:
    """Module and class of the checks of tasks that are not ours; older mixins import all of them (5.17 does)."""
    tests = importlib.util.find_spec("tests")
    source = Path(tests.submodule_search_locations[0], "test_pipeline_mixin.py").read_text()
    yield from re.findall(r"^from \.pipelines\.(\w+) import (\w+)$", source, flags=re.MULTILINE)


def install() -> None:
    """Put the stand-ins in place; before the first import of a mixin."""
    add_module("tests.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    add_module("tests.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    add_module("tests.utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_KWARGS)
    for module, name in other_pipeline_tests():
        add_module(f"tests.pipelines.{module}", **{name: type(name, (), {})})
    add_module(
        "tests.pipelines.test_pipelines_automatic_speech_recognition",
        AutomaticSpeechRecognitionPipelineTests=AutomaticSpeechRecognitionPipelineTests,
    )
    add_module(
        "tests.pipelines.test_pipelines_audio_classification",
        AudioClassificationPipelineTests=AudioClassificationPipelineTests,
    )
    # Two mixins would run transformers/__init__.py again, from a path relative to their own, to look classes up by
    # name. Beside an unpacked tests/ there is no such file; the imported package has the same names.
    transformers.utils.direct_transformers_import = lambda *args, **kwargs: sys.modules["transformers"]
