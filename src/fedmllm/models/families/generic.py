"""The path for any model of ``AutoModelForImageTextToText`` whose processor has a chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmllm.data.images import open_image
from fedmllm.errors import ModelError
from fedmllm.types import Message, Modality

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "in_proj_qkv", "in_proj_z", "out_proj")
"""As decoders call them: softmax attention apart or fused, and linear attention in hybrid decoders."""
_LORA_TARGETS = {"attention": _ATTENTION, "all-linear": (*_ATTENTION, "gate_proj", "up_proj", "down_proj", "gate_up_proj")}
CONNECTORS = {"multi_modal_projector", "connector", "merger", "deepstack_merger_list", "resampler"}
"""What models call the layers between vision tower and decoder."""
_SLICES = ("max_slice_nums", "max_patches", "pan_and_scan_max_num_crops")
"""Under which name an image processor holds into how many slices it cuts a picture at most."""


class ModelFamily:
    """How messages become tensors and where LoRA attaches. A family subclasses this and overrides what differs."""

    modalities: tuple[Modality, ...] = ("image", "text")
    """What ``prompt_tensors`` makes tensors of."""
    auto_class: str = "AutoModelForImageTextToText"
    """By which of Transformers' classes the model is loaded."""
    axes: Mapping[str, int] = MappingProxyType({})
    """Along which axis the processor's tensors of several samples stand behind one another, where it is not the first."""
    answer_type: int = 0
    """The answer's number in ``token_type_ids``, where the processor gives them for the prompt."""

    def words_chats(self, processor: ProcessorMixin) -> bool:
        """Whether ``render`` finds the chat template it needs."""
        return getattr(processor, "chat_template", None) is not None

    def render(self, processor: ProcessorMixin, messages: Sequence[Message], answer: str) -> tuple[str, str]:
        """(prompt, completion) as the chat template writes them; the completion is the answer and its end token. Both are defused.

        Raises:
            ModelError: if the template does not continue its own generation prompt.
        """
        specials = special_tokens(processor)
        chat = [_as_chat(message, specials) for message in messages]
        return continued(processor, chat, {"role": "assistant", "content": [{"type": "text", "text": defuse(answer, specials)}]})

    def prompt_tensors(self, processor: ProcessorMixin, prompt: str, messages: Sequence[Message]) -> dict[str, Tensor]:
        """The processor's tensors for one prompt: ``input_ids`` of shape (1, length) and, with images, theirs.

        Raises:
            ModelError: if a message holds a modality that the family does not read.
        """
        self.require({part.type for message in messages for part in message.parts})
        images = [open_image(part.value) for message in messages for part in message.parts if part.type == "image"]
        tensors = processor(text=[prompt], images=images or None, return_tensors="pt", add_special_tokens=False)
        return {name: tensor for name, tensor in tensors.items() if name not in ("attention_mask", "labels")}

    def batch(self, extras: Sequence[Mapping[str, Tensor]], shifts: Sequence[int]) -> dict[str, Any]:
        """The tensors beside the tokens of several samples as those of one batch.

        Args:
            extras: by sample, what ``prompt_tensors`` gave; without pixels where features stand for them.
            shifts: by how many columns padding moved each sample.
        """
        names = sorted({name for sample in extras for name in sample})
        return {name: torch.cat([sample[name] for sample in extras if name in sample], self.axes.get(name, 0)) for name in names}

    def call(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
        """The model's output for a batch."""
        return model(**inputs, **settings)

    def generate(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Tensor:
        """The tokens that continue the prompts of a batch, shape (samples, new tokens)."""
        output: Tensor = model.generate(**inputs, **settings)
        return output[:, inputs["input_ids"].shape[1] :]

    def require(self, held: Collection[Modality]) -> None:
        """Refuse what would be left out in silence.

        Raises:
            ModelError: if there is a modality that ``prompt_tensors`` does not read.
        """
        if unread := sorted(set(held) - set(self.modalities)):
            raise ModelError(
                f"samples hold {' and '.join(unread)}, the model is fed {' and '.join(self.modalities)} only; "
                "leave that column out, or write a family file for a model that takes it"
            )

    def lora_modules(self, model: nn.Module, targets: str) -> str:
        """A pattern that matches the decoder's target modules and nothing in the vision tower."""
        decoder = model.get_decoder()  # type: ignore[operator]
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        return rf"{prefix}\..*\.({'|'.join(_LORA_TARGETS[targets])})".replace(".", r"\.", prefix.count("."))

    def limit_slices(self, model: Any, processor: Any, count: int) -> bool:
        """Let the processor cut a picture into no more slices than so many, not counting the view of the whole.

        Returns:
            whether it cuts pictures at all.
        """
        images = processor.image_processor
        held = [name for name in _SLICES if getattr(images, name, None) is not None]
        for name in held:
            setattr(images, name, min(count, getattr(images, name)))
        return bool(held)

    def connector(self, model: nn.Module) -> list[str]:
        """Names of the modules between vision tower and decoder, none inside another; empty if they are not known."""
        named, inside = dict(model.named_modules()), decoder_modules(model)
        found = [name for name, module in named.items() if name.rpartition(".")[2] in CONNECTORS and id(module) not in inside]
        # PEFT takes no lists.
        lists = {name for name in found if isinstance(named[name], nn.ModuleList)}
        return [name for name in found if name not in lists] + [f"{name}.{i}" for name in lists for i, _ in named[name].named_children()]


def decoder_modules(model: Any) -> set[int]:
    """Ids of the decoder and all modules in it."""
    return set(map(id, model.get_decoder().modules()))


def without_adapters(model: Any) -> Any:
    """The Transformers model inside of PEFT's; itself if there are no adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def continued(words: Any, chat: Sequence[Mapping[str, Any]], turn: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, completion) as a processor or tokenizer writes a chat and the assistant's turn after it.

    Raises:
        ModelError: if the template does not continue its own generation prompt.
    """
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    whole = words.apply_chat_template([*chat, turn], add_generation_prompt=False, tokenize=False)
    if not whole.startswith(prompt):
        raise ModelError("the chat template's whole conversation does not begin with its generation prompt; this model needs a family file")
    return prompt, whole.removeprefix(prompt).rstrip("\n")


def special_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """The strings that the tokenizer reads as control tokens, images' placeholder included."""
    return tuple(sorted({*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}))


def _as_chat(message: Message, specials: Sequence[str]) -> dict[str, Any]:
    """A message in the chat format of Transformers; images are handed to the processor beside the text."""
    content = [
        {"type": "text", "text": defuse(str(part.value), specials)} if part.type == "text" else {"type": part.type}
        for part in message.parts
    ]
    return {"role": message.role, "content": content}


def defuse(text: str, specials: Sequence[str]) -> str:
    """Data that spell a control token are told apart from it by a space, lest a text pass for an image or an end of turn."""
    for token in specials:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def restored(text: str, specials: Sequence[str]) -> str:
    """What a model wrote that learnt from defused answers, as it stood in the data."""
    for token in specials:
        text = text.replace(f"{token[0]} {token[1:]}", token) if len(token) > 1 else text
    return text
