"""Ways of doing the same, each beside the first of its group -> a table and scores."""

from collections.abc import Sequence

import pandas

from nndecomp.evaluation.timing import Speed, middle, ratio


def table(found: Sequence[Speed]) -> pandas.DataFrame:
    return pandas.DataFrame(
        [
            {
                "what": each.group,
                "how": each.name,
                "ms": str(middle([1000 * seconds for seconds in each.wall])),
                "a second": rate(each),
                "speed beside the first": str(ratio(first(found, each).wall, each.wall)),
            }
            for each in found
        ]
    )


def seconds(found: Sequence[Speed]) -> pandas.DataFrame:
    """Of what is not compared."""
    return pandas.DataFrame(
        [{"of": each.group, "until": each.name, "seconds": str(middle(each.wall))} for each in found]
    )


def seconds_scores(found: Sequence[Speed]) -> dict[str, float]:
    return {f"{each.name.strip('-').replace(' ', '_')}_seconds": middle(each.wall).value for each in found}


def first(found: Sequence[Speed], each: Speed) -> Speed:
    return next(other for other in found if other.group == each.group)


def rate(each: Speed) -> str:
    value = each.amount / middle(each.wall).value
    return f"{value / 1e9:.2f} GB" if each.unit == "bytes" else f"{value:,.0f} {each.unit}"


def raw(found: Sequence[Speed]) -> pandas.DataFrame:
    rounds = [
        (each.group, each.name, each.amount, each.unit, number, wall)
        for each in found
        for number, wall in enumerate(each.wall)
    ]
    return pandas.DataFrame(rounds, columns=["what", "how", "amount", "unit", "round", "seconds"])


def scores(found: Sequence[Speed]) -> dict[str, float]:
    """Speed as a share of the first's."""
    return {
        f"{each.group}/{each.name}".replace(" ", "_"): ratio(first(found, each).wall, each.wall).value
        for each in found
        if each is not first(found, each)
    }
