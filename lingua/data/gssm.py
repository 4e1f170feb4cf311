"""`type: gssm`: documents of a graph of hidden states, and their exact likelihood by the forward algorithm.

A node's next state is drawn from the row of a table that its inputs select: its own last state (except for the observed
node) and the new states of its parents, which move first. Rows of tables are drawn from a Dirichlet distribution. All
states begin at 0, so token 0 of a document is 0.

The entropy of such a row has no closed form. Given the tokens before it, the distribution of the next one is exact,
and so is its entropy; the floor is the mean of these entropies over documents drawn for it, with its standard error.
(The mean of -log p(token) has the same expectation and a larger error.)

Letters: n documents, S tokens, V token ids; a table has an axis for each input, then one for the new state.
Cost of the floor: n * S * (states of all hidden nodes together) * state_dim for each hidden node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lingua.config.keys.sources import GssmArgs, NodeArgs
from lingua.data.blocked_source import Floor
from lingua.data.synthetic import AVERAGED_FROM, Process, bits, dirichlet, drawn, entropy, uniform

_AVERAGED_TOKENS = 1 << 15
_AT_ONCE = 64  # documents that are averaged together


class Gssm(Process[GssmArgs]):
    """A graph, with the tables that all documents share."""

    def __init__(self, args: GssmArgs, seed: int) -> None:
        super().__init__(args, seed)
        self.nodes, self.hidden = args.ordered(), args.hidden()

        self._shared = {node.name: self._table(node, number=0) for node in self.nodes if node.mode != "context"}

    # -- tables ----------------------------------------------------------------------------------------------------

    def _table(self, node: NodeArgs, number: int) -> np.ndarray:
        """Draw the table of a node; `number`: of the document, if each document has its own table."""
        source, width = bits(self.seed, 1 + self.args.nodes.index(node), number), node.state_dim
        sizes = [one.state_dim for one in self.args.inputs_of(node)]
        if node.kernel_type == "fullrank" or not sizes:
            rows = _moved(dirichlet(source, node.alpha, math.prod(sizes), width), node.mode)
            return rows.reshape(*sizes, width)
        table = np.ones((*sizes, width))
        for axis, size in enumerate(sizes):
            shape = [size if i == axis else 1 for i in range(len(sizes))]
            table = table * _moved(dirichlet(source, node.alpha, size, width), node.mode).reshape(*shape, width)
        return table / table.sum(-1, keepdims=True)

    def tables(self, numbers: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the tables of documents by node; those of context nodes have a first axis for the documents."""
        own = {
            node.name: np.array([self._table(node, int(number)) for number in numbers])
            for node in self.nodes
            if node.mode == "context"
        }
        return self._shared | own

    # -- documents -------------------------------------------------------------------------------------------------

    def documents(self, first: int, n: int, length: int) -> np.ndarray:
        sums = {name: table.cumsum(-1) for name, table in self.tables(range(first, first + n)).items()}
        u = uniform(self.seed, first, n, (length - 1) * len(self.nodes)).reshape(n, length - 1, len(self.nodes))
        inputs = {node.name: [one.name for one in self.args.inputs_of(node)] for node in self.nodes}
        states = {node.name: np.zeros(n, np.int64) for node in self.nodes}
        out, documents = np.zeros((n, length), np.int32), np.arange(n)
        for t in range(1, length):
            for i, node in enumerate(self.nodes):
                at = [states[name] for name in inputs[node.name]]
                at = [documents, *at] if node.mode == "context" else at
                rows = sums[node.name][tuple(at)]
                states[node.name] = drawn(np.broadcast_to(rows, (n, node.state_dim)), u[:, t - 1, i])
            out[:, t] = states[self.args.observed.name]
        return out

    # -- likelihood ------------------------------------------------------------------------------------------------

    def likelihood(self, numbers: Sequence[int] | np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for documents (n, S + 1): -log p of their labels, and the entropies. (n, S)

        Entropies are of the label's distribution given the tokens before it. `numbers`: documents whose tables to use.
        """
        n, length = tokens.shape
        tables, observed = self.tables(numbers), self.args.observed
        letters = {node.name: chr(ord("a") + i) for i, node in enumerate(self.hidden)}
        joint = "".join(letters.values())
        moves = [(self._einsum(node, letters, joint), tables[node.name]) for node in self.hidden]
        seen = "".join(letters[name] for name in observed.parents)
        of_documents = "n" if observed.mode == "context" else ""
        emits = np.moveaxis(tables[observed.name], -1, 1 if of_documents else 0)
        emits = np.broadcast_to(emits, (n, *emits.shape)) if not of_documents else emits  # (n, V, states of parents)
        belief = np.zeros((n, *(node.state_dim for node in self.hidden)))
        belief.reshape(n, -1)[:, 0] = 1.0
        nll, found = np.empty((n, length - 1)), np.empty((n, length - 1))
        documents = np.arange(n)
        for t in range(1, length):
            for formula, table in moves:
                belief = np.einsum(formula, belief, table, optimize=True)
            of_parents = np.einsum(f"n{joint}->n{seen}", belief)
            p = np.einsum(f"n{seen},nV{seen}->nV", of_parents, emits, optimize=True)
            found[:, t - 1] = entropy(p)
            now = p[documents, tokens[:, t]]
            nll[:, t - 1] = -np.log(now)
            given = emits[documents, tokens[:, t]] / now.reshape(n, *[1] * len(seen))
            belief = np.einsum(f"n{joint},n{seen}->n{joint}", belief, given)
        return nll, found

    def _einsum(self, node: NodeArgs, letters: dict[str, str], joint: str) -> str:
        """Return the einsum that moves one node: it sums over the last state; the parents have moved."""
        own, table = letters[node.name], "".join(letters[one.name] for one in self.args.inputs_of(node))
        of_documents = "n" if node.mode == "context" else ""
        return f"n{joint},{of_documents}{table}Z->n{joint.replace(own, 'Z')}"

    def floor(self, n_labels: int) -> Floor:
        if any(node.mode == "context" for node in (*self.hidden, self.args.observed)):
            return self._bounds(n_labels)
        n = min(max(_AVERAGED_TOKENS // n_labels, 16), 1024)
        means: list[float] = []
        for begin in range(AVERAGED_FROM, AVERAGED_FROM + n, _AT_ONCE):
            tokens = self.documents(begin, min(_AT_ONCE, AVERAGED_FROM + n - begin), n_labels + 1)
            means += self.likelihood(range(begin, begin + len(tokens)), tokens)[1].mean(-1).tolist()
        return Floor(float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(means)))

    def _bounds(self, n_labels: int) -> Floor:
        """Bound the entropy of documents with their own tables, which the model does not know.

        p(document) is the mean of its likelihood over all tables. The log of a mean over a sample is too small on
        average if the sample is independent, and too large if it includes the document's own tables: Jensen's
        inequality, for log w in the first case and w log w in the second (bidirectional Monte Carlo, arXiv 1511.02543).
        """
        n = min(max(math.isqrt(8 * _AVERAGED_TOKENS // n_labels), 16), _AT_ONCE)
        numbers, log_p = AVERAGED_FROM + np.arange(n), np.empty((n, n))
        tokens = self.documents(AVERAGED_FROM, n, n_labels + 1)
        for shift in range(n):  # 0: their own tables
            log_p[:, shift] = -self.likelihood(np.roll(numbers, shift), tokens)[0].sum(-1)
        low = (math.log(n) - np.logaddexp.reduce(log_p, axis=1)) / n_labels
        most = (math.log(n - 1) - np.logaddexp.reduce(log_p[:, 1:], axis=1)) / n_labels
        return Floor(float(low.mean()), float(low.std(ddof=1)) / math.sqrt(n), float(most.mean()))


def _moved(table: np.ndarray, mode: str) -> np.ndarray:
    """Swap each row's largest entry with that of its own state (slow) or of state 0 (dead)."""
    if mode not in ("slow", "dead"):
        return table
    table, rows = table.copy(), np.arange(len(table))
    to = rows if mode == "slow" else np.zeros_like(rows)
    largest = table.argmax(-1)
    table[rows, largest], table[rows, to] = table[rows, to], table[rows, largest]
    return table
