"""Live events of jobs to everybody who follows them: one task looks at the database for all.

What it finds of a job is encoded once and kept for a while, in a queue of bounded length. A stream holds nothing but
the number of the last event that it has sent: one that is new, or slower than the queue is long, reads the database
page by page until it is back in the queue. Not for threads: all but the reading runs in the event loop.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from service import events, store
from service.errors import Draining, NotFound, TooManyStreams
from service.events import PAGE, Event
from service.problems import PROBLEMS
from service.store import Database

log = logging.getLogger(__name__)
LOOK_S = 0.1
KEEP_ALIVE_S = 15.0
RETRY_MS = 1000
RECENT = 256
READERS = 2  # that read the database at a time because they are behind
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no", "vary": "Accept"}
Sent = tuple[int, str, bytes]  # number, name, frame


@dataclass
class Topic:
    """A job that is followed. `recent` holds all of its events with numbers above `floor`, up to `last`."""

    job_id: str
    floor: int
    last: int
    followers: int = 0
    gone: bool = False
    recent: deque[Sent] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, found: Sequence[Sent]) -> None:
        """Keep what has happened, and forget what is oldest."""
        self.recent.extend(found)
        self.last = found[-1][0]
        while len(self.recent) > RECENT:
            self.floor = self.recent.popleft()[0]
        self.wake()

    def wake(self) -> None:
        """Let all followers look."""
        self.news.set()
        self.news = asyncio.Event()


class Streams:
    """All streams of this process."""

    def __init__(self, database: Database, limit: int) -> None:
        self._database = database
        self._limit = limit
        self._topics: dict[str, Topic] = {}
        self._wanted = asyncio.Event()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        # Not the threads of the routes: neither shall wait for the other.
        self._watcher, self._readers = CapacityLimiter(1), CapacityLimiter(READERS)

    @property
    def count(self) -> int:
        """How many there are now."""
        return sum(topic.followers for topic in self._topics.values())

    async def run(self) -> None:
        """Look for news for as long as anybody follows anything."""
        while True:
            await self._wanted.wait()
            try:
                is_up_to_date = await self._look()
            except Exception as error:
                log.warning("the streams wait for the database: %s", getattr(error, "orig", type(error).__name__))
                is_up_to_date = True
            if is_up_to_date:
                await asyncio.sleep(LOOK_S)

    async def _look(self) -> bool:
        """Hand out what is new; the answer is whether that was all."""
        watched = dict(self._topics)
        known = {job_id: topic.last for job_id, topic in watched.items()}
        found = await to_thread.run_sync(self._news, known, limiter=self._watcher)
        for job_id, topic in watched.items():
            if job_id not in found:
                topic.gone = True
                topic.wake()
            elif found[job_id]:
                topic.add(found[job_id])
        return all(len(news) < PAGE for news in found.values())

    def _news(self, known: Mapping[str, int]) -> dict[str, list[Sent]]:
        with self._database.read.begin() as session:
            numbers = store.last_numbers(session, known)
            return {
                job_id: _sent(events.read(session, job_id, known[job_id])) if number > known[job_id] else []
                for job_id, number in numbers.items()
            }

    def _page(self, job_id: str, after: int) -> list[Sent]:
        with self._database.read.begin() as session:
            return _sent(events.read(session, job_id, after))

    @contextlib.contextmanager
    def following(self, job_id: str, last: int) -> Iterator[Topic]:
        """One follower more, meanwhile; `last` is the number of the job's last event.

        Raises Draining, TooManyStreams.
        """
        if self._stopping:
            raise Draining("the server is stopping and begins no more streams")
        if self.count >= self._limit:
            raise TooManyStreams(f"{self.count} streams are open, the limit is {self._limit}", limit=self._limit)
        topic = self._topics.setdefault(job_id, Topic(job_id, last, last))
        topic.followers += 1
        self._wanted.set()
        try:
            yield topic
        finally:
            topic.followers -= 1
            if not topic.followers:
                del self._topics[job_id]
            if not self._topics:
                self._wanted.clear()

    async def frames(self, topic: Topic, after: int) -> AsyncIterator[bytes]:
        """All events with numbers above `after`, as they come, until the job's or the server's end."""
        yield format_sse_event(comment="events of a job; resume with Last-Event-ID", retry=RETRY_MS)
        name = ""
        while name != "completed":
            if (last_word := self._last_word(topic)) is not None:
                yield last_word.frame
                return
            news, floor = topic.news, topic.floor
            found = await self._after(topic, after)
            if found:
                after, name, _ = found[-1]
                yield b"".join(frame for _, _, frame in found)
            elif after < floor:
                after = floor  # What was between has been forgotten by a new attempt.
            else:
                with anyio.move_on_after(KEEP_ALIVE_S) as silence:
                    await news.wait()
                if silence.cancelled_caught:
                    yield KEEPALIVE_COMMENT

    async def _after(self, topic: Topic, after: int) -> list[Sent]:
        if after < topic.floor:
            return await to_thread.run_sync(self._page, topic.job_id, after, limiter=self._readers)
        return [sent for sent in topic.recent if sent[0] > after]

    def _last_word(self, topic: Topic) -> Event | None:
        """What a stream ends with that the job does not end."""
        if self._stopping:
            return Event(None, "shutdown", {"detail": "the server is stopping; connect again to go on"})
        if topic.gone:
            problem = PROBLEMS[NotFound]
            return Event(None, "error", {"type": problem.slug, "title": problem.title, "detail": "it was deleted"})
        return None

    def close_soon(self) -> None:
        """End all streams, from a signal handler."""
        self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        self._stopping = True
        for topic in self._topics.values():
            topic.wake()


def _sent(found: Sequence[Event]) -> list[Sent]:
    return [(event.sequence or 0, event.name, event.frame) for event in found]


class EventStream(EventSourceResponse):
    """The answer that follows a job. It counts for as long as it is being sent."""

    def __init__(self, streams: Streams, job_id: str, last: int, after: int) -> None:
        super().__init__(content=(), headers=HEADERS)
        self._streams = streams
        self._job = (job_id, last)
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end. Raises Draining and TooManyStreams before anything is sent."""
        with self._streams.following(*self._job) as topic:
            self.body_iterator = self._streams.frames(topic, self._after)
            await super().__call__(scope, receive, send)
