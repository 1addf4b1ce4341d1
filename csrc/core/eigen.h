// Eigenvalues and eigenvectors of a small symmetric positive semi-definite matrix by cyclic Jacobi rotations.
#pragma once

#include "config.h"

namespace ebft {

// Rotates rows and columns p and q of the symmetric `a` [n,n] so that a_pq becomes 0, and rows p and q of `vectors`.
template <class Size>
EBFT_FN void jacobi_rotate(Size n, double* a, double* vectors, int p, int q) {
  double *ap = a + p * n, *aq = a + q * n, *vp = vectors + p * n, *vq = vectors + q * n;
  const double off = ap[q], app = ap[p], aqq = aq[q];
  const double difference = aqq - app, distance = fabs(difference);
  const double root = sqrt(difference * difference + 4 * off * off);
  const double t = (difference < 0 ? -2 : 2) * off / (distance + root);  // tangent of the smaller angle
  const double c = sqrt((root + distance) / (2 * root)), s = t * c;
  for (int k = 0; k < n; ++k) {
    const double x = vp[k], y = vq[k], u = ap[k], w = aq[k];
    vp[k] = c * x - s * y;
    vq[k] = s * x + c * y;
    ap[k] = c * u - s * w;
    aq[k] = s * u + c * w;
  }
  ap[p] = app - t * off;
  aq[q] = aqq + t * off;
  ap[q] = aq[p] = 0;
  for (int k = 0; k < n; ++k) {
    a[k * n + p] = ap[k];
    a[k * n + q] = aq[k];
  }
}

// Diagonalises `a` [n,n], whose largest diagonal element is between 1/2 and 1 or all of which is 0.
//
// Afterwards the eigenvalues stand on the diagonal of `a`, in no order, and row e of `vectors` [n,n] is the eigenvector
// of a_ee. An element that is negligible beside the diagonal elements of its row and column is left alone: that keeps
// small eigenvalues of a positive semi-definite matrix accurate too. A diagonal matrix gets the unit vectors.
template <class Size>
EBFT_FN void symmetric_eigen(Size n, double* a, double* vectors) {
  const double epsilon = 0x1p-53;
  const double nothing = 1e-30;  // far below the rounding of a matrix of this size, and of any square of the cut-off
  const int most_sweeps = 40;    // convergence is quadratic: 5 to 8 suffice
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) vectors[i * n + k] = i == k;
  }
  // In each round of a tournament the pairs are disjoint, so that their angles do not wait for each other.
  const int players = n + (n & 1);
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < most_sweeps; ++sweep) {
    rotated = false;
    for (int round = 0; round < players - 1; ++round) {
      for (int pair = 0; pair < players / 2; ++pair) {
        const int p = pair == 0 ? players - 1 : (round + pair) % (players - 1);
        const int q = (round + players - 1 - pair) % (players - 1);
        if (p >= n) continue;
        const double off = fabs(a[p * n + q]);
        if (off <= nothing || off * off <= epsilon * epsilon * fabs(a[p * n + p] * a[q * n + q])) continue;
        jacobi_rotate(n, a, vectors, p, q);
        rotated = true;
      }
    }
  }
}

}  // namespace ebft
