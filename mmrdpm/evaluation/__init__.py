"""Evaluation: suites, and the judges that other code can call.

The judges take plain PIL pictures and texts, so that anything that draws or captions is judged by
the same code as our own model:

    from mmrdpm.evaluation import captioned, drawn

    judge = drawn.emoji_judge()                              # all emoji without a skin tone
    top_1, top_10 = drawn.named_in_top(judge, pictures, ["red heart", "pizza"])
    print(drawn.kid(judge.features, pictures, reference, paired=True))   # of the same names
    print(captioned.cider(["a red heart"], [["red heart"]]))

Each gives a `Figure`: a value with its 95% interval, and the protocol that it may be compared by.

    suite.py         what a suite's YAML holds
    run.py           one suite over one model, resumable: `evaluate`
    emoji.py, tokenizer.py, published.py, prompts.py, captions.py   the suites, part by part
    drawn.py, captioned.py, likelihood.py                           the judges
    figure.py, part.py, results.py, store.py                        what is kept
    report.py, compare.py                                           what people look at
"""
