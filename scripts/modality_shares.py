"""Prints what the base of the ablations spends on drawing, captioning and text.

The budgets of recipes/ablations/modalities.yaml are the shares of tokens, times what an update of
each alone costs over what one of the base costs.
"""

from __future__ import annotations

from collections import Counter

from mmrdpm import recipe, shipped, text_tokenizer
from mmrdpm.data.loader import open_stream
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.sweep.run import count_flops
from mmrdpm.vocabulary import Vocabulary

DOCUMENTS = 4000
ALONE = {"drawing": (1, 0), "captioning": (0, 1), "text": (0, 0)}


def main() -> None:
    path = shipped.resolve("recipes", "ablations/model")
    base = recipe.load(ModelRecipe, path)
    images = image_tokenizer.load(shipped.resolve("tokenizers", base.tokenizers.image))
    texts = text_tokenizer.load(shipped.resolve("tokenizers", base.tokenizers.text))
    stream = open_stream(base.data, 0, images, texts, Vocabulary(texts.size, images.codebook_size))
    tokens: Counter[str] = Counter()
    for item, _ in zip(stream.documents(0, 1, None), range(DOCUMENTS), strict=False):
        drawn = item.draft.images
        kind = "text" if not drawn else "captioning" if drawn[0].clean else "drawing"
        tokens[kind] += item.draft.length(images.grid)
    whole, _ = count_flops(base)
    for kind, (image, caption) in ALONE.items():
        shares = [f"data.image_share={image}", f"data.caption_share={caption}"]
        cost, _ = count_flops(recipe.load(ModelRecipe, path, shares))
        share = tokens[kind] / tokens.total()
        print(f"{kind}: {share:.1%} of the tokens, {share * cost / whole:.1%} of the FLOPs")


if __name__ == "__main__":
    main()
