"""Which captions a budget is spent on: spread over types and near-duplicates, never the first of a file."""

import random
from collections.abc import Sequence

from nemo_prune.corpus.prompts import MOST_PROMPTS_COMPARED, Prompt, near_duplicates


def duplicate_groups(prompts: Sequence[Prompt]) -> list[int]:
    """The group of near-duplicates that each prompt is in, by number.

    Above :data:`~nemo_prune.corpus.prompts.MOST_PROMPTS_COMPARED` prompts each is a group of its own: all pairs would
    have to be compared.
    """
    if len(prompts) > MOST_PROMPTS_COMPARED:
        return list(range(len(prompts)))
    group_of = [0] * len(prompts)
    for number, group in enumerate(near_duplicates([prompt.text for prompt in prompts])):
        for position in group:
            group_of[position] = number
    return group_of


def stratified(prompts: Sequence[Prompt], seed: int = 0) -> list[int]:
    """The order in which prompts are measured: any beginning of it is spread over types and groups.

    The types take turns. Within a type, one prompt of each group of near-duplicates comes before the second of any,
    the groups in random order.

    Args:
        prompts: the corpus.
        seed: of the order.

    Returns:
        Positions in the corpus, all of them.
    """
    random_order = random.Random(seed)
    groups = duplicate_groups(prompts)
    by_kind: dict[str | None, dict[int, list[int]]] = {}
    for position, prompt in enumerate(prompts):
        by_kind.setdefault(prompt.kind, {}).setdefault(groups[position], []).append(position)
    queues = []
    for kind_groups in by_kind.values():
        members = list(kind_groups.values())
        random_order.shuffle(members)
        longest = max(map(len, members))
        queues.append([group[turn] for turn in range(longest) for group in members if turn < len(group)])
    order = []
    while any(queues):
        for queue in queues:
            if queue:
                order.append(queue.pop(0))
    return order
