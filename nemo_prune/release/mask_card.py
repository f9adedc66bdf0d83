"""The card of a mask that is published alone: what it is, for which model, and how to apply it."""

import re

from huggingface_hub import ModelCardData

from nemo_prune.facts import BaseFacts, MaskFacts
from nemo_prune.mask import NeuronMask
from nemo_prune.release.markdown import code, table

_NOT_CLAIMED = """\
- **It protects only models that are released pruned by it.** It holds no weights: anyone who has the base can use it \
with the mask or without, and the mask shows which rows matter.
- A pruned model has not forgotten: optimised text embeddings and fine-tuning may bring images back. Prompts that \
were not examined are not covered."""

# What comes from a mask is untrusted; a name of another form is shown as text and put into no command.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def mask_card(mask: NeuronMask, facts: MaskFacts, repo_id: str) -> str:
    """A card from what the mask knows; it names no caption.

    Args:
        mask: what is published.
        facts: what its file says beside it.
        repo_id: where it is published.
    """
    base = facts.base or BaseFacts()
    base_id = base.repo_id if _HUB_ID.fullmatch(base.repo_id or "") else None
    at_commit = f" at commit {code(base.commit)}" if base.commit else ""
    data = ModelCardData(base_model=base_id, tags=["nemo-prune", "memorization", "neuron-mask"])
    model = code(base_id or base.name or "a model that it does not name")
    counts = [(code(name), count, mask.sizes[name]) for name, count in mask.counts.items()]
    # `demo` names its model here, too.
    named = next((name for name in (base.model, base_id) if _HUB_ID.fullmatch(name or "")), None)
    where = "" if named else " `base` stands for the base model, wherever it is."
    rebuild = f"nemo-prune export --model {named or 'base'} --mask {repo_id} --out pruned/"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# A mask of memorization neurons",
        f"{mask.num_neurons} neurons of {model}{at_commit} that make it give training images back, found by nemo-prune "
        "with the method NeMo ([Hintersdorf et al., NeurIPS 2024](https://arxiv.org/abs/2406.02366)). It is small; "
        "no weights and no captions are in it.",
        "## What is not claimed",
        _NOT_CLAIMED,
        "## Use",
        f"The pruned model, which stock diffusers loads.{where}\n\n```bash\n{rebuild}\n```",
        "Or without writing anything:\n\n```python\nfrom nemo_prune import NeuronMask, apply_mask, find_mask\n\n"
        f'with apply_mask(pipe, NeuronMask.load(find_mask("{repo_id}"))):\n'
        '    image = pipe("a caption").images[0]\n```',
        "## Neurons",
        table(("layer", "pruned", "of"), [*counts, ("all", mask.num_neurons, sum(mask.sizes.values()))]),
    ]
    if mask.combinations:
        parts.append(
            "Kept neurons of a layer stand in for them on ordinary captions; on memorized ones all neurons are held "
            "near their means. The mask also says by which combinations, and how weights and biases behind the layers "
            "change by that: who has it and a model that was pruned by it can undo that part without the base. "
            "Publish it only if the base is public anyway."
        )
    elif mask.shifts:
        parts.append(
            "Each keeps its mean on ordinary captions: the mask also says by how much the biases behind these layers "
            "are shifted."
        )
    return "\n\n".join(parts) + "\n"
