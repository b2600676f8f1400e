"""The path for any model of ``AutoModelForImageTextToText`` whose processor has a chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import ProcessorMixin

from fedmllm.data.images import open_image
from fedmllm.errors import ModelError
from fedmllm.types import Message, Modality

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "in_proj_qkv", "in_proj_z", "out_proj")
"""As decoders call them: softmax attention apart or fused, and linear attention in hybrid decoders."""
_LORA_TARGETS = {"attention": _ATTENTION, "all-linear": (*_ATTENTION, "gate_proj", "up_proj", "down_proj", "gate_up_proj")}


class ModelFamily:
    """How messages become tensors and where LoRA attaches. A family subclasses this and overrides what differs."""

    modalities: tuple[Modality, ...] = ("image", "text")
    """What ``prompt_tensors`` makes tensors of."""
    chats: bool = True
    """Whether ``render`` needs the processor's chat template."""
    axes: Mapping[str, int] = MappingProxyType({})
    """Along which axis the processor's tensors of several samples stand behind one another, where it is not the first."""
    answer_type: int = 0
    """The answer's number in ``token_type_ids``, where the processor gives them for the prompt."""

    def render(self, processor: ProcessorMixin, messages: Sequence[Message], answer: str) -> tuple[str, str]:
        """(prompt, completion) as the chat template writes them; the completion is the answer and its end token.

        Raises:
            ModelError: if the template does not continue its own generation prompt.
        """
        specials = special_tokens(processor)
        chat = [_as_chat(message, specials) for message in messages]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = processor.apply_chat_template([*chat, turn], add_generation_prompt=False, tokenize=False)
        if not whole.startswith(prompt):
            raise ModelError(
                "the chat template's whole conversation does not begin with its generation prompt; this model needs a family file"
            )
        return prompt, whole.removeprefix(prompt).rstrip("\n")

    def prompt_tensors(self, processor: ProcessorMixin, prompt: str, messages: Sequence[Message]) -> dict[str, Tensor]:
        """The processor's tensors for one prompt: ``input_ids`` of shape (1, length) and, with images, theirs.

        Raises:
            ModelError: if a message holds a modality that the family does not read.
        """
        self.require({part.type for message in messages for part in message.parts})
        images = [open_image(part.value) for message in messages for part in message.parts if part.type == "image"]
        tensors = processor(text=[prompt], images=images or None, return_tensors="pt", add_special_tokens=False)
        return {name: tensor for name, tensor in tensors.items() if name not in ("attention_mask", "labels")}

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
