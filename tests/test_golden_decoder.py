"""The decoders against the authors' released code, on the fast path and on the reference."""

import pytest
from checks.golden_decoder import adamixer_decoder, check_decoder, stage_interactor_decoder
from checks.golden_files import PRECISIONS, Golden, golden_files


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("path", golden_files("decoder"), ids=lambda path: path.stem)
def test_every_stage_of_the_released_stage_interactor_is_reproduced(path, dtype, operations):
    check_decoder(Golden(path, dtype), stage_interactor_decoder)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("path", golden_files("adamixer"), ids=lambda path: path.stem)
def test_every_stage_of_the_released_adamixer_is_reproduced(path, dtype, operations):
    check_decoder(Golden(path, dtype), adamixer_decoder)
