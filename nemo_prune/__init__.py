"""nemo-prune: prune memorization neurons from text-to-image diffusion models before release.

Example:
    A whole run on the demo model that the package carries:

    >>> from pathlib import Path
    >>> from nemo_prune import Plan, VerificationSettings, memorized_captions, ordinary_captions
    >>> from nemo_prune import prune_model, read_corpus, resolve_model
    >>> source = resolve_model("demo")
    >>> corpus = read_corpus(memorized_captions("demo"), limit=1)
    >>> plan = Plan(out=Path("pruned"), verification=VerificationSettings(evidence_budget=0))
    >>> result = prune_model(source, corpus, ordinary_captions("demo"), plan)
    >>> result.record.prompts.localized
    1
    >>> (result.out / "model_index.json").is_file()
    True
"""

import lazy_loader

__version__ = "0.1.0"

# Public names load their module on first use; `nemo-prune --help` need not load torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
