"""Finds attention by what it computes, and makes it one call of ``fxport::attention``.

`rewrite.rewrite_attention` is the pass; the other files are its stages:

    where      softmax, sdpa, flex     where an attention may begin
               unread, vmapped         what looks like one and is only reported
               bodies                  .. of which a part may be in the body of another operation
    respell    fills, chains,          what has another spelling gets the usual one
               repeats, cosines, broadcasts
               ones, parts, spread     .. and its own back where that led nowhere (respelled)
    match      match                   back to the product of Q and K, forward to that with V:
               scores, weights         .. what happens on the way
               paths, trace            .. which ways there are, where an operand comes from
               quotient, logsum, lse   .. a softmax written out (made: what a value is made as)
               terms, join, factors    .. sums of products, several values, factors of single keys
    axes       views, layout           what every dimension is made of
               products, frame         .. and what it is: batch, head, query, key, size
    masks      masks, learned          a flag, slopes or a bias (proofs: `fxport.passes.masks`)
               empty_rows, bounds      .. and what a row without any key would give
    emit       checks, emit            may one call stand here; the call
               bias, sinks             .. and what no flag says
    say        site, records           what was found, for other passes and for the report
"""
