"""Which rows of logits a step computes, and whose they are."""

from __future__ import annotations

from peqa_runtime.engine.batch import Batch, ScheduledSequence
from peqa_runtime.engine.sequence import Sequence


def logit_positions(item: ScheduledSequence) -> range:
    """Positions of the sequence whose logits the step needs: for prompt log-probabilities, and to sample."""
    params, end = item.sequence.request.params, item.start + item.num_tokens
    positions = range(0) if params.prompt_logprobs is None else item.prompt_logprob_positions
    if not (item.samples and params.max_tokens > 0):
        return positions
    return range(positions.start, end) if positions else range(end - 1, end)


class LogitRows:
    """Which row of the logits belongs to whom. Rows of one sequence are adjacent, the sampled one last.

    `rows` and `prompt` are in the order of the batch: all rows of a sequence, and those of them for prompt
    log-probabilities. `sampled`: the last row of each sequence that gets a token. `ruled`: those of them with rules
    for single tokens, behind the sequence's place in the batch. `reports`: some want log-probabilities.
    """

    def __init__(self, batch: Batch) -> None:
        self.items = batch.scheduled
        self.rows: list[range] = []
        self.prompt: list[range] = []
        self.sampled: list[tuple[int, Sequence]] = []
        self.ruled: list[tuple[int, int, Sequence]] = []
        self.reports = False
        row = 0
        for place, item in enumerate(batch.scheduled):
            params = item.sequence.request.params
            end = row + len(logit_positions(item))
            prompt = row if params.prompt_logprobs is None else row + len(item.prompt_logprob_positions)
            self.rows.append(range(row, end))
            self.prompt.append(range(row, prompt))
            if end > prompt:
                self.sampled.append((prompt, item.sequence))
                if params.ruled:
                    self.ruled.append((place, prompt, item.sequence))
            self.reports |= prompt > row or (end > prompt and params.logprobs is not None)
            row = end
        self.num_rows = row
