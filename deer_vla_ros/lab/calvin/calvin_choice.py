"""What is evaluated on CALVIN, chosen from files and numbers: chains, sentences and single tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.calvin.calvin_benchmark import CalvinBenchmark, versions_of
from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall, CalvinProcess
from deer_vla_ros.lab.calvin.calvin_sequences import TASK_RULES, CalvinSequence, generate, read, states_for
from deer_vla_ros.lab.calvin.calvin_wordings import enriched, published, words_of_chains
from deer_vla_ros.lab.scoring.sentences import Sentence

SEQUENCES, MOST_SEQUENCES = 1000, 10_000
"""How many chains CALVIN's own evaluation generates, and the most that are generated."""


@dataclass(frozen=True)
class CalvinChoice:
    """What is evaluated on CALVIN.

    sequences: a file of chains, or the number of chains to generate. chains: only the first ones of those
    whose tasks are all in `tasks`; None: all. enriched: a file of other wordings for the chains. sentences:
    replace CALVIN's own. trials: of every single task, or of every sentence. seed: selects the states of
    single tasks, and the sentences where a task has several.
    """

    install: CalvinInstall
    sequences: Path | int = SEQUENCES
    chains: int | None = None
    enriched: Path | None = None
    tasks: tuple[str, ...] = tuple(TASK_RULES)
    sentences: tuple[Sentence, ...] = ()
    trials: int = 0
    seed: int = 0

    def benchmark(self) -> CalvinBenchmark:
        """The benchmark, after its files were read and one simulator has started.

        Raises UserError if CALVIN is not complete, a file cannot be used, or there is nothing to evaluate.
        """
        print("starting CALVIN's simulator", flush=True)
        self.install.check()
        own = [Sentence(task, text, "published") for task, text in published(self.install.root).items()]
        sentences = self.sentences or own
        sequences, words = self._chains(sentences)
        alone = self._alone(sentences) if self.trials else ()
        if not sequences and not alone:
            raise UserError(
                "evaluate: no chain contains only these tasks, and no single task is given: give more "
                "--tasks, or --trials"
            )
        with CalvinProcess(self.install) as process:
            versions = versions_of(process)
        return CalvinBenchmark(self.install, versions, sequences, words, alone, self.tasks, self.seed)

    def _chains(
        self, sentences: list[Sentence] | tuple[Sentence, ...]
    ) -> tuple[tuple[CalvinSequence, ...], tuple[tuple[Sentence, ...], ...]]:
        """The chains, and the sentences of each."""
        if self.chains == 0:
            return (), ()
        every = self._every_sequence()
        kept = [number for number, each in enumerate(every) if set(each.tasks) <= set(self.tasks)]
        if self.chains is not None and self.chains > len(kept):
            raise UserError(
                f"evaluate: --chains is {self.chains}, and {len(kept)} of the {len(every)} sequences have "
                "only the tasks asked for: give fewer chains"
            )
        kept = kept[: self.chains]
        sequences = tuple(every[number] for number in kept)
        if self.enriched is None:
            return sequences, words_of_chains(sentences, sequences, self.seed)
        words = enriched(self.enriched, every, self.seed)
        return sequences, tuple(words[number] for number in kept)

    def _every_sequence(self) -> tuple[CalvinSequence, ...]:
        if isinstance(self.sequences, Path):
            return read(self.sequences, TASK_RULES)
        if not 1 <= self.sequences <= MOST_SEQUENCES:
            raise UserError(
                f"evaluate: --sequences is {self.sequences}: give 1 to {MOST_SEQUENCES}, or a file"
            )
        print(f"drawing {self.sequences} chains as CALVIN does (1,000 take about half a minute)", flush=True)
        return generate(self.sequences)

    def _alone(self, sentences: list[Sentence] | tuple[Sentence, ...]) -> tuple[Sentence, ...]:
        """The sentences of those tasks that a start state allows. Says which tasks none allows."""
        asked = [each for each in sentences if each.task in self.tasks]
        left_out = [task for task in dict.fromkeys(each.task for each in asked) if not states_for(task)]
        if left_out:
            print(f"not given alone, because no start state of CALVIN allows it: {', '.join(left_out)}")
        alone = tuple(each for each in asked if each.task not in left_out)
        for each in alone:
            if self.trials > (count := len(states_for(each.task))):
                raise UserError(
                    f"evaluate: --trials is {self.trials}, and {each.task} has {count} start states in "
                    "CALVIN: give at most as many, since each is given once"
                )
        return alone
