"""The network: the only package that imports pynetdicom.

Asking: ``association`` opens and explains, ``echo``, ``find``, ``move`` and ``get`` ask,
``identifier`` guards what leaves, ``proposal`` says what a C-GET can take. Receiving:
``acceptor`` is the storage SCP, ``transfer`` the loop from socket to file that it shares with
C-GET, ``lobby`` where connections wait before, ``negotiation`` what they agree on. Answers:
``status`` and ``rejection`` give them a reason, ``outcome`` is the end of a retrieve. ``sockets``
and ``quiet`` are for all.
"""
