import pytest

from lineament._base.extras import available


@pytest.fixture
def digits() -> None:
    """Skips a test where the digits, which scikit-learn carries, aren't there."""
    if not available("sklearn"):
        pytest.skip("digits and photographs come with scikit-learn")
