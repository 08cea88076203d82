"""One call for the questions of many threads that wait at the same time."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class _Ticket(Generic[Question, Answer]):
    """One thread's question, and what becomes of it."""

    key: Hashable
    question: Question
    woken: Event = field(default_factory=Event)
    leads: bool = False
    answer: Answer | None = None
    error: Exception | None = None


class SharedCalls(Generic[Question, Answer]):
    """Lets threads that wait at the same time share one call.

    While there are fewer calls under way than may be, whoever asks calls at once, alone. Others
    wait; when a call ends, the one that has waited longest makes the next, for itself and for all
    that wait with the same key. So nobody waits in order that a batch may grow.

    Args:
        call: Answers questions of one key, in their order. Runs in the thread of one who asked.
            An error of its is raised to all whose questions it got.
        at_once: How many calls may be under way.
        most: How many questions one call gets at most.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Question]], Sequence[Answer]],
        *,
        at_once: int,
        most: int,
    ) -> None:
        self._call = call
        self._free = at_once
        self._most = most
        self._lock = Lock()
        # Nobody waits while a call is free.
        self._waiting: list[_Ticket[Question, Answer]] = []

    def ask(self, key: Hashable, question: Question) -> Answer:
        """Have a question answered.

        Args:
            key: Only questions with equal keys share a call.
            question: What `call` understands.
        """
        ticket = _Ticket[Question, Answer](key, question)
        self._queue(ticket)
        try:
            if not ticket.leads:
                ticket.woken.wait()
            if ticket.leads:
                self._lead(ticket)
        except BaseException:
            self._leave(ticket)
            raise
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer  # type: ignore[return-value]  # there, where no error is

    def _queue(self, ticket: _Ticket[Question, Answer]) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                ticket.leads = True
            else:
                self._waiting.append(ticket)

    def _lead(self, ticket: _Ticket[Question, Answer]) -> None:
        """Make a call for a ticket and for those that go with it."""
        with self._lock:
            alike = [each for each in self._waiting if each.key == ticket.key]
            others = alike[: self._most - 1]
            self._waiting = [each for each in self._waiting if each not in others]
        together = [ticket, *others]
        try:
            answers = self._call([each.question for each in together])
            for each, answer in zip(together, answers, strict=True):
                each.answer = answer
        except Exception as error:  # noqa: BLE001 - raised by `ask`, in every thread
            for each in together:
                each.error = error
        except BaseException:
            # An interrupt is this thread's alone; the others' questions are as good as before.
            with self._lock:
                self._waiting = others + self._waiting
            raise
        self._pass_on(ticket)
        for each in others:
            each.woken.set()

    def _pass_on(self, ticket: _Ticket[Question, Answer]) -> None:
        """Let the next one call."""
        with self._lock:
            ticket.leads = False
            if not self._waiting:
                self._free += 1
                return
            following = self._waiting.pop(0)
            following.leads = True
        following.woken.set()

    def _leave(self, ticket: _Ticket[Question, Answer]) -> None:
        """Take an interrupted thread's ticket out of the queue, or hand on its call."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        if ticket.leads:
            self._pass_on(ticket)
