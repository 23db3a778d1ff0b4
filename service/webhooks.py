"""Webhooks: a signed message when a job ends (Standard Webhooks), until its receiver has taken it.

What is owed stands in the database since the transaction that ended the job. Every process that serves the API sends;
each message is taken by one of them at a time, and again if that one dies: receivers tell by `webhook-id` what they
have. A message is delivered by an answer of 2xx; on 410 it is given up, on all else it is sent again, ever later.
"""

import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import anyio
import httpx
from anyio import CapacityLimiter, to_thread
from standardwebhooks import Webhook

from service import outbound, store, views
from service.errors import AddressRefused, BadRequestValue
from service.http import VERSION
from service.outbound import Unreachable
from service.representations import to_json
from service.schemas import WebhookSpec
from service.settings import Settings
from service.store import Claimed, Database, DeliveryState, JobRow

log = logging.getLogger(__name__)
LOOK_S = 0.5
AT_ONCE = 16
FACTOR = 4  # by which each wait is longer than the one before
LONGEST_WAIT_S = 12 * 60 * 60
GONE = 410
Result = TypeVar("Result")


async def check(settings: Settings, webhook: WebhookSpec | None, at: str = "/webhook") -> None:
    """Refuse a webhook that could not be sent, as the value `at` its place in the body.

    Raises BadRequestValue, without any password of its URL.
    """
    if webhook is None:
        return
    if not settings.webhook_secrets:
        raise BadRequestValue(at, None, "cannot be sent: the operator has set no RANKSCOPE_WEBHOOK_SECRET")
    try:
        await outbound.resolve(webhook.url, private=settings.webhook_private)
    except AddressRefused as error:
        shown = None if "@" in webhook.url else webhook.url
        raise BadRequestValue(f"{at}/url", shown, error.detail) from None


def message(job: JobRow, delivery_event: str) -> bytes:
    """What the receiver is told: the kind of event, its time, and the job without its specification."""
    job_view = views.job(job)
    return to_json({
        "type": f"{job.kind}.{delivery_event}", "timestamp": job_view["finished_at"], "data": job_view,
    })  # fmt: skip


def signed(secrets: list[str], message_id: str, body: bytes) -> dict[str, str]:
    """The headers that prove who sends it and when; there is a signature of each secret, so that they can change."""
    moment = datetime.now(UTC)
    signatures = [Webhook(secret).sign(message_id, moment, body.decode()) for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
        "content-type": "application/json",
        "user-agent": f"rankscope/{VERSION}",
    }


def next_wait(first_s: float, attempts: int) -> float:
    """Seconds from the end of one attempt to the next: exponential, with jitter."""
    longest = min(first_s * float(FACTOR) ** (attempts - 1), LONGEST_WAIT_S)
    return longest * random.uniform(0.5, 1)  # noqa: S311  (it spreads load, it guards nothing)


class Sender:
    """Sends what is owed, some at a time."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._threads = CapacityLimiter(1)  # of its own, for the database alone
        self._free = anyio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Send for ever."""
        if not self._settings.webhook_secrets:
            return
        async with outbound.new_client(self._settings.webhook_s) as client, anyio.create_task_group() as group:
            while True:
                await self._free.acquire()
                claimed = await self._insist(self._claim)
                if claimed is None:
                    self._free.release()
                    await anyio.sleep(LOOK_S)
                else:
                    group.start_soon(self._deliver, client, claimed)

    def _claim(self) -> Claimed | None:
        with self._database.read.begin() as session:
            if not store.any_due(session):
                return None
        with self._database.write.begin() as session:
            # Who takes it has the time for an attempt, twice.
            return store.claim_delivery(session, 2 * self._settings.webhook_s)

    async def _deliver(self, client: httpx.AsyncClient, claimed: Claimed) -> None:
        started, moment = time.monotonic(), views.timestamp(store.now())
        try:
            status, error = await self._attempt(client, claimed)
            seconds = round(time.monotonic() - started, 3)
            tried = {"at": moment, "status": status, "error": error, "seconds": seconds}
            await self._insist(lambda: self._settle(claimed, tried))
        finally:
            self._free.release()

    async def _attempt(self, client: httpx.AsyncClient, claimed: Claimed) -> tuple[int | None, str | None]:
        """The status of the answer, or why there is none."""
        settings, url = self._settings, claimed.job.spec["webhook"]["url"]
        body = message(claimed.job, claimed.delivery.event)
        headers = signed(settings.webhook_secrets, claimed.delivery.id, body)
        try:
            with anyio.fail_after(settings.webhook_s):
                target = await outbound.resolve(url, private=settings.webhook_private)
                return await outbound.post(client, target, headers, body), None
        except TimeoutError:
            return None, f"there was no answer in {settings.webhook_s:g} s"
        except (AddressRefused, Unreachable) as error:
            return None, error.detail
        except Exception as error:  # One message shall not be the end of all.
            log.exception("delivery %s of job %s", claimed.delivery.id, claimed.job.id)
            return None, f"an unexpected {type(error).__name__}"

    def _settle(self, claimed: Claimed, tried: dict[str, Any]) -> None:
        delivery, status = claimed.delivery, tried["status"]
        state: DeliveryState = "pending"
        if status is not None and 200 <= status < 300:
            state = "delivered"
        elif status == GONE or delivery.attempts >= self._settings.webhook_attempts:
            state = "failed"
        wait_s = next_wait(self._settings.webhook_wait_s, delivery.attempts) if state == "pending" else 0
        with self._database.write.begin() as session:
            store.settle(session, delivery, tried, state, wait_s)
        log.info("delivery %s of job %s, attempt %d: %s", delivery.id, delivery.job_id, delivery.attempts, state)

    async def _insist(self, work: Callable[[], Result]) -> Result:
        """Do this with the database, and wait while it is away."""
        while True:
            try:
                return await to_thread.run_sync(work, limiter=self._threads)
            except Exception as error:
                log.warning("the webhooks wait for the database: %s", getattr(error, "orig", type(error).__name__))
                await anyio.sleep(LOOK_S)
