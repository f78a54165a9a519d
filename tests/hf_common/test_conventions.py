"""What transformers' mixins take for granted and never check: class attributes, automatic classes, whole folders."""

import json
import tempfile
import unittest
from pathlib import Path

import torch
import transformers

import dinosr_hf
from dinosr_hf import DinoSRConfig
from tiny_dinosr import (
    BASE,
    HEADS,
    LETTERS,
    MODELS,
    DinoSRModelTester,
    num_frames,
    write_checkpoint,
)

TASK_MODELS = {name: model_class for name, model_class in MODELS.items() if name != BASE}


class DinoSRConventionsTest(unittest.TestCase):
    variant = ""

    def setUp(self):
        transformers.set_seed(0)
        self.tester = DinoSRModelTester(self, variant=self.variant)

    def test_every_exported_class_is_tested(self):
        exported = {
            name
            for name, value in vars(dinosr_hf).items()
            if isinstance(value, type)
            and issubclass(value, transformers.PreTrainedModel)
            and not name.endswith("PreTrainedModel")
        }
        self.assertEqual(exported, set(MODELS))

    def test_class_attributes(self):
        # a False here would let whole groups of the common tests pass without running
        for name, model_class in MODELS.items():
            with self.subTest(name):
                self.assertIs(model_class.config_class, DinoSRConfig)
                self.assertEqual(model_class.main_input_name, "input_values")
                self.assertTrue(model_class.supports_gradient_checkpointing)
                self.assertTrue(model_class._supports_sdpa)
                self.assertTrue(model_class._can_record_outputs)
                self.assertFalse(model_class.can_generate())

    def test_heads_hold_the_base_model_under_its_prefix(self):
        for name, model_class in TASK_MODELS.items():
            with self.subTest(name):
                model = model_class(self.tester.get_config())
                self.assertIsInstance(getattr(model, model.base_model_prefix, None), MODELS[BASE])
                self.assertIs(model.base_model, getattr(model, model.base_model_prefix))

    def test_default_config_uses_sdpa(self):
        for name, model_class in MODELS.items():
            with self.subTest(name):
                self.assertEqual(model_class(self.tester.get_config()).config._attn_implementation, "sdpa")

    def test_training_step_gives_a_finite_loss_and_gradients(self):
        for name, model_class in TASK_MODELS.items():
            with self.subTest(name):
                config, inputs = self.tester.prepare_config_and_inputs_for_common()
                model = model_class(config).train()
                loss = model(**inputs, **self.tester.labels_for(model_class)).loss
                self.assertEqual(loss.dim(), 0)
                self.assertTrue(torch.isfinite(loss))
                loss.backward()
                for key, parameter in model.named_parameters():
                    self.assertEqual(parameter.grad is not None, parameter.requires_grad, key)
                    self.assertTrue(parameter.grad is None or torch.isfinite(parameter.grad).all(), key)

    def test_loss_survives_saving_and_loading(self):
        # test_save_load compares outputs without labels: it never looks at a codebook or a teacher
        for name, model_class in TASK_MODELS.items():
            config, inputs = self.tester.prepare_config_and_inputs_for_common()
            inputs.update(self.tester.labels_for(model_class))
            with self.subTest(name), tempfile.TemporaryDirectory() as folder, torch.no_grad():
                model = model_class(config)
                for step in range(1, 4):  # let whatever training changes move away from its initial value
                    model.train()(**inputs)
                    if name == "DinoSRForPreTraining":
                        model.update_targets(step)
                before = model.eval()(**inputs).loss
                model.save_pretrained(folder)
                after = model_class.from_pretrained(folder).eval()(**inputs).loss
                torch.testing.assert_close(after, before)

    def test_training_works_from_the_meta_device(self):
        # from_pretrained builds every model there; a tensor that is neither parameter nor buffer stays behind
        for name, model_class in TASK_MODELS.items():
            with self.subTest(name):
                config, inputs = self.tester.prepare_config_and_inputs_for_common()
                with torch.device("meta"):
                    model = model_class(config)
                model.to_empty(device="cpu")
                model.init_weights()
                loss = model.train()(**inputs, **self.tester.labels_for(model_class)).loss
                self.assertEqual(loss.device.type, "cpu")
                self.assertTrue(torch.isfinite(loss))

    def test_freeze_feature_encoder(self):
        for name, model_class in MODELS.items():
            with self.subTest(name):
                model = model_class(self.tester.get_config())
                model.freeze_feature_encoder()
                extractor = model.base_model.feature_extractor
                self.assertFalse(any(p.requires_grad for p in extractor.parameters()))
                self.assertTrue(any(p.requires_grad for p in model.parameters()))

    def test_output_lengths_helper(self):
        # fine-tuning scripts and the CTC loss read it
        model = MODELS["DinoSRForCTC"](self.tester.get_config())
        lengths = [5120, 1024, 700]
        got = model._get_feat_extract_output_lengths(torch.tensor(lengths))
        self.assertEqual(got.tolist(), [num_frames(length, self.variant) for length in lengths])

    def test_auto_config(self):
        with tempfile.TemporaryDirectory() as folder:
            self.tester.get_config().save_pretrained(folder)
            self.assertIs(type(transformers.AutoConfig.from_pretrained(folder)), DinoSRConfig)
        self.assertIs(type(transformers.AutoConfig.for_model("dinosr")), DinoSRConfig)

    def test_auto_models(self):
        for name, (auto, _) in HEADS.items():
            with self.subTest(name), tempfile.TemporaryDirectory() as folder:
                auto_class = getattr(transformers, auto)
                self.assertIs(type(auto_class.from_config(self.tester.get_config())), MODELS[name])
                MODELS[name](self.tester.get_config()).save_pretrained(folder)
                loaded, info = auto_class.from_pretrained(folder, output_loading_info=True)
                self.assertIs(type(loaded), MODELS[name])
                self.assertFalse(info["missing_keys"] or info["unexpected_keys"], info)

    def test_auto_processing_classes_by_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, "DinoSRForCTC")
            for auto, expected in (
                ("AutoProcessor", "Wav2Vec2Processor"),
                ("AutoTokenizer", "Wav2Vec2CTCTokenizer"),
                ("AutoFeatureExtractor", "Wav2Vec2FeatureExtractor"),
            ):
                with self.subTest(auto):
                    self.assertEqual(type(getattr(transformers, auto).from_pretrained(folder)).__name__, expected)

    def test_auto_processing_classes_by_config_alone(self):
        # nothing but config.json and bare values: the classes must come from the model type
        with tempfile.TemporaryDirectory() as folder:
            self.tester.get_config().save_pretrained(folder)
            (Path(folder) / "vocab.json").write_text(json.dumps(LETTERS))
            (Path(folder) / "preprocessor_config.json").write_text(
                json.dumps({"feature_size": 1, "sampling_rate": 16000, "do_normalize": True})
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self.assertEqual(type(tokenizer).__name__, "Wav2Vec2CTCTokenizer")
            extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
            self.assertEqual(type(extractor).__name__, "Wav2Vec2FeatureExtractor")

    def test_pretraining_checkpoint_loads_into_every_class(self):
        # fine-tuning starts there: the base weights arrive whole
        source = MODELS["DinoSRForPreTraining"](self.tester.get_config())
        base = source.base_model.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            for name, model_class in MODELS.items():
                with self.subTest(name):
                    model, info = model_class.from_pretrained(folder, output_loading_info=True)
                    for key, tensor in model.base_model.state_dict().items():
                        torch.testing.assert_close(tensor, base[key], msg=f"{name}: {key} was not loaded")
                    prefix = model.base_model_prefix + "."
                    missing = [key for key in info["missing_keys"] if key.startswith(prefix) or name == BASE]
                    self.assertEqual(missing, [])


class DinoSRLogMelConventionsTest(DinoSRConventionsTest):
    variant = "LogMel"
