"""The usual loop: Transformers' ``Trainer``, a new one for each client and round."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from fedmllm.models.lora import read_weights, write_weights
from fedmllm.types import Weights
from loops.workload import Done, Go, Workload, collate_with_labels


class InOrder(Trainer):
    """A trainer that visits the samples in their given order."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset or self.train_dataset)


def run(work: Workload, go: Go, done: Done, off: str = "") -> None:
    """Run rounds of one client after another."""
    while go():
        start, mean = time.perf_counter(), dict.fromkeys(work.start, 0.0)
        for client in work.clients:
            after = train(work, client, work.start)
            mean = {name: mean[name] + tensor / len(work.clients) for name, tensor in after.items()}
        done(time.perf_counter() - start, mean)


def train(work: Workload, client: str, received: Weights) -> Weights:
    """Train a client and return its weights."""
    training = work.experiment.training
    write_weights(work.vlm.model, received)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.accumulation,
            num_train_epochs=1,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=training.beta1,
            adam_beta2=training.beta2,
            weight_decay=training.weight_decay,
            max_grad_norm=training.clip_norm or 0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=work.vlm.device.type == "cpu",
            bf16=work.vlm.dtype == torch.bfloat16,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        collator = partial(collate_with_labels, work.vlm)
        loop = InOrder(model=work.vlm.model, args=arguments, train_dataset=work.in_order(client), data_collator=collator)
        loop.remove_callback(PrinterCallback)
        loop.train()
    return read_weights(work.vlm.model)
