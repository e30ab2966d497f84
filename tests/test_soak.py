"""Workers that die in mid-call: a few in every run, a hundred in `make soak`."""

from __future__ import annotations

import pytest

from interp_kernel.spec import WorkerSpec
from tests.helpers_worker import DEMO, sessions
from tests.soak import ERROR_S, WAYS, soak, table

pytestmark = pytest.mark.usefixtures("no_warm_worker")


@pytest.mark.parametrize("n", [len(WAYS), pytest.param(100, marks=pytest.mark.soak)])
def test_each_death_is_one_clear_error_soon_and_the_next_call_recovers(
    n: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with sessions() as connect:
        session = connect(WorkerSpec(model_name=DEMO, dtype="bfloat16"))
        deaths = soak(session, n)
        session.stop()
    with capsys.disabled():
        print("\n" + table(deaths))
    assert [problem for death in deaths for problem in death.problems] == []
    assert max(death.error_s for death in deaths) < ERROR_S
    assert len(deaths) == n == session.loads - 1
