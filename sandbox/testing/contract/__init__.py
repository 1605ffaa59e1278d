"""What every backend promises, as checks that run against a real one.

A backend from elsewhere proves itself by `python -m warmcell.sandbox.testing.contract MODULE:FACTORY`, or in tests:

    from warmcell.sandbox.testing.contract import CHECKS, Subject

    @pytest.mark.parametrize("check", CHECKS, ids=str)
    async def test_contract(check, subject): await check.run(subject)

Which checks apply follows from the backend's declared capabilities; `Check.applies` tells.
"""

from warmcell.sandbox.testing.contract.checks import CHECKS
from warmcell.sandbox.testing.contract.subject import Box, Check, ContractError, Subject

__all__ = ["CHECKS", "Box", "Check", "ContractError", "Subject"]
