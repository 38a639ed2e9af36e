"""Which rows of logits a step computes, and whose they are."""

from __future__ import annotations

from peqa_runtime.engine.batch import Batch, ScheduledSequence
from peqa_runtime.engine.sequence import Sequence


def logit_positions(item: ScheduledSequence) -> range:
    """Positions of the sequence whose logits the step needs: for prompt log-probabilities, and always the share's last.

    The last one tells whether what the share writes is finite, also where nothing is sampled: a token's NaN is in the
    keys and values of its layers, and so in every later position that attends to it (sliding windows of all layers
    together end somewhere).
    """
    end = item.start + item.num_tokens
    positions = item.prompt_logprob_positions
    return range(positions.start, end) if positions else range(end - 1, end)


class LogitRows:
    """Which row of the logits belongs to whom. Rows of one sequence are adjacent, the sampled one last.

    `rows`, `prompt` and `chosen` are in the order of the batch: all rows of a sequence, those of them for prompt
    log-probabilities, and the one that gives it a token, or None. `sampled`: the latter with their sequences. `ruled`:
    those of them with rules for single tokens, behind the sequence's place in the batch. `reports`: some want
    log-probabilities.
    """

    def __init__(self, batch: Batch) -> None:
        self.items = batch.scheduled
        self.rows: list[range] = []
        self.prompt: list[range] = []
        self.chosen: list[int | None] = []
        self.sampled: list[tuple[int, Sequence]] = []
        self.ruled: list[tuple[int, int, Sequence]] = []
        self.reports = False
        row = 0
        for place, item in enumerate(batch.scheduled):
            params = item.sequence.request.params
            end = row + len(logit_positions(item))
            prompt = row if params.prompt_logprobs is None else row + len(item.prompt_logprob_positions)
            samples = item.samples and params.max_tokens > 0
            self.rows.append(range(row, end))
            self.prompt.append(range(row, prompt))
            self.chosen.append(end - 1 if samples else None)
            if samples:
                self.sampled.append((end - 1, item.sequence))
                if params.ruled:
                    self.ruled.append((place, end - 1, item.sequence))
            self.reports |= prompt > row or (samples and params.logprobs is not None)
            row = end
        self.num_rows = row
