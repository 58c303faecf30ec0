"""The n-gram rules as dictionaries and loops over every token: slow, and easy to check by eye."""

import math
from collections import Counter, defaultdict

START = "<s>"


class Reference:
    """Counts of documents (lists of ids) and every rule of `ngram`, one context at a time."""

    def __init__(self, documents, order, vocab_size, eos=None, discounts=None):
        self.order, self.vocab_size = order, vocab_size
        self.counts = [defaultdict(Counter) for _ in range(order)]
        for document in documents:
            text = [START, *document] + ([eos] if eos is not None else [])
            for t in range(1, len(text)):
                for n in range(min(order, t + 1)):
                    self.counts[n][tuple(text[t - n : t])][text[t]] += 1
        self.adjusted = [self._adjust(n) for n in range(order)]
        self.discounts = discounts or [self._discount(n) for n in range(order)]

    def _adjust(self, n):
        if n == self.order - 1:
            return self.counts[n]
        adjusted = defaultdict(Counter)
        for context, row in self.counts[n + 1].items():
            for token in row:
                adjusted[context[1:]][token] += 1
        for context, row in self.counts[n].items():
            if context[:1] == (START,):
                adjusted[context] = row
        return adjusted

    def _discount(self, n):
        values = [c for row in self.adjusted[n].values() for c in row.values()]
        n1, n2, n3, n4 = (values.count(j) for j in (1, 2, 3, 4))
        if not (n1 and n2 and n3):
            return (0.5, 1.0, 1.5)
        y = n1 / (n1 + 2 * n2)
        d = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        return d if all(0 <= x <= j for j, x in enumerate(d, 1)) else (0.5, 1.0, 1.5)

    def matched(self, history):
        """Contexts of each order that were seen, shortest first."""
        contexts = [tuple(history[len(history) - n :]) for n in range(self.order) if n <= len(history)]
        return [c for n, c in enumerate(contexts) if c in self.counts[n]]

    def kneser_ney(self, history, token):
        prob = 1 / self.vocab_size
        for context in self.matched(history):
            row = self.adjusted[len(context)][context]
            d = self.discounts[len(context)]
            total = sum(row.values())
            backoff = sum(d[min(c, 3) - 1] for c in row.values()) / total
            own = max(row[token] - d[min(row[token], 3) - 1], 0) / total if token in row else 0.0
            prob = own + backoff * prob
        return prob

    def sparse(self, rule, history, token, k, weights, confidence="none"):
        total = 0.0
        for context in self.matched(history):
            row = self.counts[len(context)][context]
            n = sum(row.values())
            kept = sorted(row, key=lambda t: (-row[t], t))[:512]
            if token not in kept:
                continue
            trust = {"none": 1.0, "wb": n / (n + len(row)), "count(5)": n / (n + 5)}[confidence]
            if rule == "paper":
                value = math.log((row[token] + k) / (n + k * self.vocab_size))
            else:
                value = math.log((row[token] + k) / k)
            total += weights[len(context)] * trust * value
        return total

    def mixture(self, history, token, k, weights):
        above = below = 0.0
        for context in self.matched(history):
            row = self.counts[len(context)][context]
            kept = sorted(row, key=lambda t: (-row[t], t))[:512]
            count = row[token] if token in kept else 0
            above += weights[len(context)] * (count + k) / (sum(row.values()) + k * self.vocab_size)
            below += weights[len(context)]
        return above / below
