"""The usual loop: Transformers' ``Trainer``, a new one for each client and round."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial

from transformers import PrinterCallback, Trainer, TrainingArguments

from fedmllm.models.lora import read_weights, write_weights
from loops.workload import Workload, collate_with_labels


def rounds(work: Workload) -> Iterator[float]:
    """Seconds of one round after another."""
    training = work.experiment.training
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.accumulation,
            num_train_epochs=1,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            adam_beta2=training.beta2,
            max_grad_norm=training.clip_norm or 0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        while True:
            start = time.perf_counter()
            for samples in work.clients.values():
                write_weights(work.vlm.model, work.start)
                encoded = [work.encoder(sample) for sample in samples]
                collator = partial(collate_with_labels, work.vlm)
                loop = Trainer(model=work.vlm.model, args=arguments, train_dataset=encoded, data_collator=collator)
                loop.remove_callback(PrinterCallback)
                loop.train()
                read_weights(work.vlm.model)
            yield time.perf_counter() - start
