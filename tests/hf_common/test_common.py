"""
transformers' own mixins on every model class, the configuration, the pipelines and a training run.

The mixins come out of the sdist of the installed version; run.sh puts its root, which holds tests/, on the path. Some
of what they import or look up is not there, so the order of this file matters: stand-ins, then their modules.
"""

import copy
import itertools
import json
import math
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

import hf_stubs
from dinosr_hf import DinoSRConfig
from tiny_dinosr import (
    DETERMINISTIC_VALUES,
    HEADS,
    MODELS,
    TINY_VALUES,
    VARIANTS,
    DinoSRModelTester,
    make_processor,
    tiny_config,
    write_checkpoint,
)

TINY_FOLDER = Path(tempfile.mkdtemp(prefix="tiny_models_"))


def write_tiny_model_summary() -> None:
    """The table of tiny models, and where they are, that PipelineTesterMixin reads when it is imported."""
    summary = {
        name: {
            "tokenizer_classes": ["Wav2Vec2CTCTokenizer"] if name == "DinoSRForCTC" else [],
            "processor_classes": ["Wav2Vec2FeatureExtractor"],
            "model_classes": [name],
        }
        for name in MODELS
    }
    reports = TINY_FOLDER / "reports"
    reports.mkdir()
    (reports / "tiny_model_summary.json").write_text(json.dumps(summary))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(TINY_FOLDER)


write_tiny_model_summary()
hf_stubs.install()

import tests.test_modeling_common as common
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_training_mixin import TrainingTesterMixin


def add_heads_to_mixin_tables() -> None:
    """
    List our classes in the tables of in-tree models by which the mixins recognise heads.

    Only the mixins' view changes: transformers' automatic classes stay as the package leaves them.
    """
    for name, (_, table) in HEADS.items():
        if hasattr(common, table):
            extended = copy.copy(getattr(common, table))
            extended[DinoSRConfig.model_type] = name
            setattr(common, table, extended)


add_heads_to_mixin_tables()


class CommonSuite(ModelTesterMixin):
    # A waveform model has no token embeddings to resize.
    test_resize_embeddings = False
    variant = ""

    def setUp(self):
        set_seed(0)
        self.model_tester = DinoSRModelTester(self, variant=self.variant)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        if return_labels:
            inputs.update(self.model_tester.labels_for(model_class))
        return inputs

    def test_can_init_all_missing_weights(self):
        # The test skips models of before 2023, and takes the year from the head of the configuration's file.
        with mock.patch.object(common, "open", mock.mock_open(read_data="# Copyright 2026"), create=True):
            super().test_can_init_all_missing_weights()


for _variant, (_name, _class) in itertools.product(VARIANTS, MODELS.items()):
    globals()[f"{_name}{_variant}Test"] = type(
        f"{_name}{_variant}Test",
        (CommonSuite, unittest.TestCase),
        {
            "all_model_classes": (_class,),
            "variant": _variant,
            # Teacher and codebooks are frozen; 5.17's gradient checkpointing tests unfreeze them and then miss their
            # gradients. test_conventions.py asks that all other parameters have one.
            "test_all_params_have_gradient": _name != "DinoSRForPreTraining",
            "__module__": __name__,
        },
    )


class DinoSRConfigTest(unittest.TestCase):
    def setUp(self):
        self.model_tester = DinoSRModelTester(self)
        self.config_tester = ConfigTester(self, config_class=DinoSRConfig, has_text_modality=True, hidden_size=36)

    def test_model_type(self):
        self.assertEqual(DinoSRConfig.model_type, "dinosr")

    def test_tiny_values_are_fields(self):
        # a configuration keeps unknown names without a word
        self.assertEqual(set(TINY_VALUES) - set(DinoSRConfig.__dataclass_fields__), set())

    def test_inputs_to_logits_ratio(self):
        # the speech recognition pipeline aligns its chunks to this
        self.assertEqual(tiny_config().inputs_to_logits_ratio, math.prod(TINY_VALUES["conv_stride"]))

    def test_wrong_types_are_refused(self):
        with pytest.raises(StrictDataclassError, match="hidden_size"):
            DinoSRConfig(hidden_size="sixteen")

    def test_conv_lists_of_unequal_length_are_refused(self):
        with pytest.raises((ValueError, StrictDataclassError), match="conv_kernel"):
            DinoSRConfig(conv_dim=(32, 32), conv_stride=(4, 4), conv_kernel=(8,))

    def test_json_has_what_was_set(self):
        written = json.loads(tiny_config().to_json_string())
        for name, value in TINY_VALUES.items():
            self.assertEqual(written[name], list(value) if isinstance(value, tuple) else value, name)


for _check in (
    "create_and_test_config_common_properties",
    "create_and_test_config_to_json_string",
    "create_and_test_config_to_json_file",
    "create_and_test_config_from_and_save_pretrained",
    "create_and_test_config_from_and_save_pretrained_subfolder",
    "create_and_test_config_from_and_save_pretrained_composite",
    "create_and_test_config_with_num_labels",
    "check_config_arguments_init",
    "create_and_test_config_from_pretrained_custom_kwargs",
    "check_config_can_be_init_without_params",
):
    setattr(
        DinoSRConfigTest,
        "test_" + _check.replace("create_and_test_", "").replace("check_", ""),
        lambda self, check=_check: getattr(self.config_tester, check)(),
    )


PIPELINE_MODELS = {
    "automatic-speech-recognition": "DinoSRForCTC",
    "audio-classification": "DinoSRForSequenceClassification",
}


class DinoSRPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {task: MODELS[name] for task, name in PIPELINE_MODELS.items()}

    @classmethod
    def setUpClass(cls):
        cls.model_tester = DinoSRModelTester(cls)
        for name in PIPELINE_MODELS.values():
            folder = TINY_FOLDER / DinoSRConfig.model_type / name
            write_checkpoint(folder, name)
            # PipelineTesterMixin loads the parts one by one, so each needs a file of its own
            make_processor().feature_extractor.save_pretrained(folder)
            if name == "DinoSRForCTC":
                make_processor().tokenizer.save_pretrained(folder)


for _attribute in dir(DinoSRPipelineTest):
    if _attribute.startswith("test_pipeline_"):
        _task = _attribute.removeprefix("test_pipeline_").removesuffix("_fp16").replace("_", "-")
        if _task not in PIPELINE_MODELS:
            setattr(DinoSRPipelineTest, _attribute, None)


class Overfit(TrainingTesterMixin):
    """The training mixin knows text only; hand it audio where it asks for a text batch."""

    model_class = None
    model_tester = None
    variant = ""
    training_overfit_learning_rate = 2e-2
    training_overfit_steps = 100

    def setUp(self):
        self.model_tester = DinoSRModelTester(self, self.training_overfit_batch_size, self.variant)
        config = tiny_config(**DETERMINISTIC_VALUES, **VARIANTS[self.variant])
        self.model_tester.get_config = lambda: config

    def _get_trainable_model_class(self):
        return self.model_class

    def _get_model_modality(self):
        return "text"

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs.update(self.model_tester.labels_for(self.model_class))
        return inputs


for _variant, _name in itertools.product(
    VARIANTS, ("DinoSRForCTC", "DinoSRForSequenceClassification", "DinoSRForAudioFrameClassification")
):
    globals()[f"{_name}{_variant}OverfitTest"] = type(
        f"{_name}{_variant}OverfitTest",
        (Overfit, unittest.TestCase),
        {"model_class": MODELS[_name], "variant": _variant, "__module__": __name__},
    )
