"""Secure aggregation: the server learns the sum of the clients' vectors and no single one.

The protocol is the one of Bonawitz et al. (CCS 2017) for an active adversary, on vectors of integers modulo 2^32. A client k with vector
x_k sends

    y_k = x_k + PRG(b_k) + sum_{j > k} PRG(s_kj) - sum_{j < k} PRG(s_kj)   mod 2^32

The secrets s_kj are agreed between two clients and cancel in the sum. The seed b_k protects a client whose vector arrives after it was
counted as dropped. Every client splits its seed and its mask key into shares for all clients, any t of which give the secret back: the seed
for a client in the sum, the mask key for one that is not, and never both.

=============  ===========================================  ==================================================
stage          the server sends                             a client answers
=============  ===========================================  ==================================================
``keys``       ``Opening``                                  ``PublicKeys``, signed by the site's key
``shares``     ``Peers``: all public keys, the threshold t  ``SealedShares``: a pair of shares for each peer
``masked``     ``Inbox``: its pairs, everyone's weight      ``MaskedVector``
``survivors``  ``Survivors``: whose vectors arrived         ``Endorsement``: a signature over them
``unmask``     ``Endorsements``                             ``Revealed``: one share for each client
=============  ===========================================  ==================================================

With ``t = floor(2n / 3) + 1`` a server needs at least a third of the n sites as accomplices to get both secrets of a client, or to have two
different lists of survivors endorsed.

Two additions keep a server from aiming a sum at one client. A signature over the survivors also covers everything that clients must agree
on: all public keys, who is masked with whom, all weights, the length. And since a sum in which the others weigh nothing is an update in the
clear, every client sees all weights and endorses no sum in which one client weighs more than ``Policy.largest_share``.

What is not promised: a client can send any vector, because nobody sees it. Sites learn each other's weights.
"""
