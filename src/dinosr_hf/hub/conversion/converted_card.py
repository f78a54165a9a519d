"""The card of a converted folder. It names no licence unless one is given: `hub.push` asks for it."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .layout import Layout

TASKS = {"pretraining": "feature-extraction", "model": "feature-extraction", "ctc": "automatic-speech-recognition"}

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A [DinoSR](https://arxiv.org/abs/2305.10005) model, converted with dinosr-hf from `{{ file }}` (layout: {{ layout }}).

| | |
|---|---|
| parameters | {{ num_parameters }} |
| encoder | {{ encoder }} |
| input | 16 kHz mono, zero mean and unit variance an utterance |

## Licence

{{ license_text }}
{% if notes %}
## To check

What the file does not say, or says of what this model does not have:

{% for note in notes -%}
- {{ note }}
{% endfor -%}
{% endif %}{% if left %}
## What of the file is not here

| entry | why |
|---|---|
{% for name, why in left.items() -%}
| `{{ name }}` | {{ why }} |
{% endfor -%}
{% endif %}"""


def converted_card(model: PreTrainedModel, layout: Layout, file: str, license: str | None) -> ModelCard:
    """
    Render the card.

    Args:
        model: The converted model.
        layout: What it was made of.
        file: Name of the source, without its place.
        license: Licence of the weights, by the Hub's identifier; None: the card says that it is to be filled in.
    """
    known = f"What is known of the source's licence: {layout.licence}."
    config = model.config
    return ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="transformers",
            pipeline_tag=TASKS[layout.architecture],
            tags=["dinosr", "speech", "audio"],
        ),
        template_str=_TEMPLATE,
        title=file,
        file=file,
        layout=layout.name,
        num_parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        encoder=f"{config.num_hidden_layers} layers, width {config.hidden_size}",
        license_text=known if license else f"**To be filled in** (`license:` at the top). {known}",
        notes=layout.notes,
        left=layout.left,
    )
