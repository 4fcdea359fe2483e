"""What the official SDK sends again after a reply that was lost, and in which form."""

from collections.abc import Callable

from .conftest import Tenant
from .test_requests import a_run


def test_a_save_that_comes_again_for_another_sampler_is_the_same_save(new_tenant: Callable[[], Tenant]) -> None:
    """The SDK numbers the sampler anew each time that it sends the request."""
    with new_tenant().http() as http:
        run = a_run(http)

        def save(slot: int) -> str:
            body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": slot}
            answer = http.post("save_weights_for_sampler", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["request_id"]

        request = save(0)
        result = http.post("retrieve_future", json={"request_id": request}).json()
        assert save(1) == request
        assert http.post("retrieve_future", json={"request_id": request}).json() == result
        assert result["sampling_session_id"]
