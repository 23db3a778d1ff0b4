"""Webhooks between a real server and a real receiver: signed, retried, delivered after a crash, and kept from
places where they must not go."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook, WebhookVerificationError

from service import outbound, store
from service.errors import AddressRefused
from service.outbound import Target, Unreachable
from service.schemas import resolve
from service.settings import Settings
from service.webhooks import LONGEST_WAIT_S, next_wait
from tests.conftest import Server, start_server, stop_server, wait_for
from tests.receiver import Receiver, receiving
from tests.test_bad_inputs import problem

SECRET, OLD_SECRET = (f"whsec_{letter * 32}" for letter in "Ab")
QUICK = {
    "RANKSCOPE_WEBHOOK_SECRET": f"{SECRET},{OLD_SECRET}",
    "RANKSCOPE_WEBHOOK_PRIVATE": "true",
    "RANKSCOPE_WEBHOOK_S": "1",
    "RANKSCOPE_WEBHOOK_ATTEMPTS": "4",
    "RANKSCOPE_WEBHOOK_WAIT_S": "0.01",
}


def end(server: Server) -> None:
    assert stop_server(server) == 0
    assert "Traceback" not in server.log.read_text()
    for secret in (SECRET, OLD_SECRET):
        assert secret.removeprefix("whsec_") not in server.log.read_text()
    assert "/hook" not in server.log.read_text()


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose jobs stay queued until they are canceled; its webhooks may go anywhere."""
    running = start_server(tmp_path_factory.mktemp("hooks") / "data", workers=0, **QUICK)
    yield running
    end(running)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose webhooks go to public addresses only."""
    running = start_server(
        tmp_path_factory.mktemp("strict") / "data", workers=0, **{**QUICK, "RANKSCOPE_WEBHOOK_PRIVATE": "false"}
    )
    yield running
    end(running)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


def post(server: Server, receiver: Receiver, **more: Any) -> str:
    job: str = server.post({"webhook": {"url": receiver.url, **more}, "training": {"epochs": 1}})["id"]
    return job


def cancel(server: Server, job: str) -> None:
    assert server.client.post(f"/experiments/{job}/cancel").status_code == 200


def deliveries(server: Server, job: str) -> list[dict[str, Any]]:
    answer = server.client.get(f"/experiments/{job}/deliveries")
    assert answer.status_code == 200, answer.text
    listed: list[dict[str, Any]] = answer.json()["data"]
    return listed


def settled(server: Server, job: str) -> dict[str, Any]:
    """The delivery of a job, once there is one that is not pending."""

    def found() -> dict[str, Any] | None:
        return next((one for one in deliveries(server, job) if one["state"] != "pending"), None)

    delivery: dict[str, Any] = wait_for(found, "the delivery to be settled")
    return delivery


def test_a_finished_run_is_told_once_and_signed(tmp_path: Path, receiver: Receiver) -> None:
    server = start_server(tmp_path / "data", **QUICK)
    done, quiet = post(server, receiver), server.post({"training": {"epochs": 1}})["id"]
    spec = {"training": {"epochs": 9, "lr": 1e300}, "network": {"activation": "relu"}, "data": {"target": "relu"}}
    failed = server.post({**spec, "webhook": {"url": receiver.url, "events": ["failed"]}})["id"]
    silent = server.post({"training": {"epochs": 1}, "webhook": {"url": receiver.url, "events": ["failed"]}})["id"]
    assert [settled(server, job)["state"] for job in (done, failed)] == ["delivered"] * 2
    assert server.wait(silent)["status"] == server.wait(quiet)["status"] == "succeeded"
    assert deliveries(server, silent) == deliveries(server, quiet) == []
    told = {}
    for got in receiver.got:
        for secret in (SECRET, OLD_SECRET):
            message = Webhook(secret).verify(got.body, got.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(got.body.replace(b"experiment", b"Experiment"), got.headers)
        told[message["data"]["id"]] = (message["type"], got.headers["webhook-id"])
        state = server.read(message["data"]["id"])
        assert message["timestamp"] == state["finished_at"]
        assert message["data"] == {name: state[name] for name in message["data"]}
    (delivery,) = deliveries(server, done)
    assert told == {
        done: ("experiment.succeeded", delivery["id"]),
        failed: ("experiment.failed", deliveries(server, failed)[0]["id"]),
    }
    assert (delivery["type"], delivery["attempts"], delivery["next_at"]) == ("experiment.succeeded", 1, None)
    assert [(tried["status"], tried["error"]) for tried in delivery["log"]] == [(204, None)]
    assert len(receiver.got) == 2
    end(server)


def test_a_delivery_is_tried_again_under_its_id_until_it_is_taken(idle: Server, receiver: Receiver) -> None:
    receiver.answers += [500, 429, 204]
    job = post(idle, receiver)
    cancel(idle, job)
    delivery = settled(idle, job)
    assert (delivery["state"], [tried["status"] for tried in delivery["log"]]) == ("delivered", [500, 429, 204])
    assert receiver.ids() == [delivery["id"]] * 3


@pytest.mark.parametrize(("answers", "attempts"), [([404] * 9, 4), ([410], 1)])
def test_a_delivery_that_nobody_takes_is_given_up(
    idle: Server, receiver: Receiver, answers: list[int | str], attempts: int
) -> None:
    receiver.answers += answers
    job = post(idle, receiver)
    cancel(idle, job)
    delivery = settled(idle, job)
    assert (delivery["state"], delivery["attempts"], len(receiver.got)) == ("failed", attempts, attempts)


def test_receivers_that_hang_redirect_or_never_end_do_no_harm(idle: Server, receiver: Receiver) -> None:  # F22
    with receiving() as elsewhere:
        receiver.answers += ["hang", elsewhere.url, "endless"]
        job = post(idle, receiver)
        cancel(idle, job)
        delivery = settled(idle, job)
        assert [tried["status"] for tried in delivery["log"]] == [None, 307, 200]
        assert delivery["log"][0]["error"] == "there was no answer in 1 s"
        assert elsewhere.got == []


def test_a_receiver_that_is_not_there_is_tried_again(idle: Server) -> None:
    with receiving() as receiver:
        pass
    job = post(idle, receiver)
    cancel(idle, job)
    delivery = settled(idle, job)
    assert {tried["error"] for tried in delivery["log"]} == {"no connection could be made"}


def end_as_a_worker(data: Path) -> None:
    """End the next job in line, as a worker does that has no server beside it."""
    database = store.connect(Settings(data=data))
    with database.write.begin() as session:
        row = store.claim_next(session, "w")
        assert row is not None
        store.end(session, store.Token(row.id, row.attempt), "succeeded")
    database.engine.dispose()


def test_what_is_owed_is_delivered_after_a_crash(tmp_path: Path, receiver: Receiver) -> None:
    first = start_server(tmp_path / "data", workers=0, **QUICK)
    half, unsent = post(first, receiver, events=["canceled"]), post(first, receiver)
    receiver.answers.append("hang")
    cancel(first, half)
    wait_for(lambda: receiver.got, "the attempt that is cut short")
    first.process.kill()
    stop_server(first)
    end_as_a_worker(tmp_path / "data")  # Nobody is there to send.
    second = start_server(tmp_path / "data", workers=0, **QUICK)
    sent = {job: settled(second, job) for job in (half, unsent)}
    assert [(one["state"], one["attempts"]) for one in sent.values()] == [("delivered", 2), ("delivered", 1)]
    assert sorted(receiver.ids()) == sorted([sent[half]["id"]] * 2 + [sent[unsent]["id"]])
    end(second)


def test_two_servers_deliver_nothing_twice(idle: Server, receiver: Receiver) -> None:
    other = start_server(idle.data, workers=0, **QUICK)
    jobs = [post(idle, receiver) for _ in range(20)]
    for job in jobs:
        cancel(idle, job)
    ids = {settled(other, job)["id"] for job in jobs}
    assert sorted(receiver.ids()) == sorted(ids)
    assert len(ids) == 20
    end(other)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/", "file:///etc/passwd", "http://127.0.0.1", "https://user:pw@example.org/",
        "http://localhost/", "http://[::1]/", "http://0.0.0.0/", "http://10.0.0.1:8080/", "http://192.168.1.1/",
        "http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://[::ffff:127.0.0.1]/", "http://[fe80::1]/",
        "http://[64:ff9b::7f00:1]/", "http://100.64.0.1/", "gopher://example.org/", "//example.org/", "example.org",
        "http://", "http://:80/", "http://a b/", "http://no-such-host.invalid/", "https://example.org:99999/",
        "http://" + "a" * 70 + ".org/", "", "x" * 2001, "http://exa\nmple.org/",
    ],
)  # fmt: skip
def test_row_44_a_webhook_to_where_none_may_go_is_refused(strict: Server, url: str) -> None:
    answer = strict.client.post("/experiments", json={"webhook": {"url": url}})
    assert problem(answer, 422, "validation-error")["errors"][0]["pointer"] == "/webhook/url"
    assert "pw@" not in answer.text


@pytest.mark.parametrize(
    "webhook",
    [
        {}, {"events": ["failed"]}, {"url": 1}, {"url": "https://example.org/", "events": []}, "https://example.org/",
        {"url": "https://example.org/", "events": ["running"]}, {"url": "https://example.org/", "secret": "mine"},
    ],
)  # fmt: skip
def test_a_webhook_of_another_form_is_refused(strict: Server, webhook: Any) -> None:
    answer = strict.client.post("/experiments", json={"webhook": webhook})
    pointer = problem(answer, 422, "validation-error")["errors"][0]["pointer"]
    assert pointer.startswith("/webhook")


def test_without_a_secret_there_are_no_webhooks(server: Server) -> None:
    answer = server.client.post("/experiments", json={"webhook": {"url": "https://example.org/"}})
    assert "RANKSCOPE_WEBHOOK_SECRET" in problem(answer, 422, "validation-error")["detail"]
    assert server.client.get("/limits").json()["webhooks"] is False


def test_row_44_an_address_is_checked_again_when_it_is_sent_to(strict: Server, receiver: Receiver) -> None:
    job = queue_unchecked(strict.data, receiver.url)
    cancel(strict, job)
    delivery = settled(strict, job)
    assert delivery["state"] == "failed"
    assert {tried["error"] for tried in delivery["log"]} == {"leads to an address that is not public"}
    assert receiver.got == []


def queue_unchecked(data: Path, url: str) -> str:
    """Queue an experiment as a server does whose webhooks may go anywhere."""
    database = store.connect(Settings(data=data))
    spec = resolve({"webhook": {"url": url}}).model_dump()
    job = {"kind": "experiment", "owner": "public", "name": None, "tags": {}, "spec": spec, "priority": "normal"}
    with database.write.begin() as session:
        row = store.create_job(session, {**job, "total": 1}, queue_limit=1000)
    database.engine.dispose()
    return row.id


def send(target: Target) -> int:
    async def once() -> int:
        async with outbound.new_client(5) as client:
            return await outbound.post(client, target, {"webhook-id": "1"}, b"{}")

    return asyncio.run(once())


def test_the_address_that_was_checked_is_the_one_that_is_asked(receiver: Receiver) -> None:
    """The name means nothing to any resolver: what is connected to is the address, and the first is not there."""
    url = httpx.URL(f"http://name.invalid:{receiver.port}/hook?a=b")
    assert send(Target(url, ["127.0.0.99", "127.0.0.1"])) == 204
    assert receiver.got[0].headers["host"] == f"name.invalid:{receiver.port}"


@pytest.mark.parametrize(("name", "answers"), [("name.invalid", True), ("other.invalid", False)])
def test_a_certificate_must_be_of_the_name_in_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, answers: bool
) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=name.invalid", "-days", "2"]
    command += ["-addext", "subjectAltName=DNS:name.invalid", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with receiving(context) as receiver, ExitStack() as expected:
        if not answers:
            expected.enter_context(pytest.raises(Unreachable))
        assert send(Target(httpx.URL(f"https://{name}:{receiver.port}/"), ["127.0.0.1"])) == 204
    assert bool(receiver.got) == answers


@pytest.mark.parametrize(
    "url", ["http://xn--/", "http://a.example:0/", "http://a.example:65536/", "http://a.example:x/"]
)
def test_row_44_an_url_that_leads_nowhere_is_refused(idle: Server, url: str) -> None:
    answer = idle.client.post("/experiments", json={"webhook": {"url": url}})
    assert problem(answer, 422, "validation-error")["errors"][0]["pointer"] == "/webhook/url"


@pytest.mark.parametrize("host", ["[2001:4860:4860::8888]", "8.8.8.8"])
def test_public_addresses_are_where_webhooks_go(host: str) -> None:
    target = asyncio.run(outbound.resolve(f"https://{host}/a", private=False))
    assert target.addresses == [host.strip("[]")]
    with pytest.raises(AddressRefused):
        asyncio.run(outbound.resolve("https://192.0.2.1/a", private=False))


def test_waits_grow_with_jitter_up_to_half_a_day() -> None:
    for attempts in range(1, 20):
        longest = min(5 * 4 ** (attempts - 1), LONGEST_WAIT_S)
        waits = {next_wait(5, attempts) for _ in range(50)}
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(waits) > 1


@pytest.mark.parametrize("secret", ["hush-hush", "whsec_c2hvcnQ=", f"{SECRET},whsec_?", "whsec_" + "A" * 99, "A" * 32])
def test_a_weak_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ValidationError, match="webhook_secret") as caught:
        Settings(webhook_secret=secret)
    assert secret not in str(caught.value)
    assert SECRET not in repr(Settings(webhook_secret=SECRET))
